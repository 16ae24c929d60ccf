"""RWKV-7 as data: published sizes, ranks, and what is read off tensor shapes."""

import math
from dataclasses import replace

import pytest

from rookery.errors import BadCheckpoint
from rookery.families.rwkv7 import PRESETS, RWKV7Config, config_from_shapes, create, is_unused, recognise, tensor_shapes

PUBLISHED = {
    "0.1b": 191_034_624,
    "0.4b": 450_767_872,
    "1.5b": 1_527_404_544,
    "2.9b": 2_947_735_040,
    "7.2b": 7_199_141_888,
    "pile-0.1b": 167_638_272,
    "pile-0.4b": 419_572_736,
    "pile-1.4b": 1_465_014_272,
}
RANKS = {
    768: (64, 64, 32, 128),
    1024: (64, 64, 64, 160),
    2048: (128, 128, 64, 224),
    2560: (128, 128, 96, 256),
    4096: (160, 160, 96, 320),
}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_presets_have_the_published_number_of_parameters(preset):
    assert sum(math.prod(shape) for shape in tensor_shapes(PRESETS[preset]).values()) == PUBLISHED[preset]


@pytest.mark.parametrize("preset", PRESETS)
def test_parameters_add_up_to_the_closed_form(preset):
    config = PRESETS[preset]
    width, layers, vocab = config.hidden_size, config.num_hidden_layers, config.vocab_size
    ranks = config.decay_rank + config.rate_rank + config.value_rank + config.gate_rank
    ffn = config.intermediate_size
    total = 2 * vocab * width + 4 * width + layers * width * (4 * width + 2 * ffn + 2 * ranks + 19)
    total -= 2 * width * config.value_rank + width  # the first block has no value residual
    assert sum(math.prod(shape) for shape in tensor_shapes(config).values()) == total


def test_state_of_the_smallest_release_has_66_numbers_per_layer_and_channel():
    config = PRESETS["0.1b"]
    assert config.state_nbytes(tokens_seen=10**6, batch=1, itemsize=4) == 4 * 608_256
    # bfloat16 halves the shifts, not the matrices
    assert config.state_nbytes(tokens_seen=0, batch=2, itemsize=2) == 2 * 12 * 768 * (2 * 2 + 64 * 4)


@pytest.mark.parametrize("width", RANKS)
def test_new_models_get_the_ranks_of_the_newest_official_formula(width):
    config = create(hidden_size=width)
    assert (config.decay_rank, config.rate_rank, config.value_rank, config.gate_rank) == RANKS[width]
    assert config.intermediate_size == 4 * width
    assert config.head_dim == 64


def test_a_size_given_wins_over_the_formula():
    config = create(hidden_size=256, gate_rank=7, intermediate_size=11)
    assert (config.gate_rank, config.intermediate_size, config.decay_rank) == (7, 11, 32)
    assert create(hidden_size=32).head_dim == 32


def test_a_width_that_heads_do_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"hidden_size \(100\) must be a multiple of head_dim \(64\)"):
        create(hidden_size=100)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_size_is_read_off_the_tensors(preset):
    shapes = tensor_shapes(PRESETS[preset])
    assert recognise(shapes)
    assert config_from_shapes(shapes) == PRESETS[preset]


def test_sizes_that_no_formula_gives_are_read_off_the_tensors():
    odd = RWKV7Config(
        vocab_size=11,
        hidden_size=48,
        num_hidden_layers=2,
        head_dim=16,
        intermediate_size=50,
        decay_rank=3,
        rate_rank=5,
        value_rank=7,
        gate_rank=9,
    )
    assert config_from_shapes(tensor_shapes(odd)) == odd
    lone = replace(odd, num_hidden_layers=1)
    assert config_from_shapes(tensor_shapes(lone)).num_hidden_layers == 1


def test_a_missing_tensor_is_named():
    shapes = tensor_shapes(PRESETS["test"])
    del shapes["blocks.0.att.w1"]
    with pytest.raises(BadCheckpoint, match=r"not a whole RWKV-7 checkpoint: 'blocks\.0\.att\.w1' is missing"):
        config_from_shapes(shapes)


def test_heads_that_do_not_make_the_width_are_refused():
    shapes = tensor_shapes(PRESETS["test"]) | {"blocks.0.att.r_k": (3, 16)}
    with pytest.raises(BadCheckpoint, match="3 × 16, which does not make the width 32"):
        config_from_shapes(shapes)


@pytest.mark.parametrize("extra", ["blocks.0.ffn.s_emb.weight", "blocks.0.qkv.qq.weight", "blocks.1.ffn.enn.weight"])
def test_its_successors_are_not_taken_for_it(extra):
    assert not recognise(tensor_shapes(PRESETS["test"]) | {extra: (1, 1)})


def test_only_the_first_value_residual_is_unused():
    unused = [f"blocks.0.att.v{i}" for i in range(3)]
    assert all(is_unused(name) for name in unused)
    assert not any(is_unused(name) for name in tensor_shapes(PRESETS["test"]))
