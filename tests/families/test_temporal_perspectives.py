"""Temporal perspectives as data: published counts, sizes of states, and what is read off a file."""

import math

import pytest

from rookery.errors import BadCheckpoint
from rookery.families.temporal_perspectives import BASES, FAMILY, added_parameters, around, create
from rookery.registry import configure, families, recognise


@pytest.mark.parametrize(
    ("size", "plain", "added", "state"),
    [
        ("169m", 169_342_464, {2: 47_616, 3: 94_464, 4: 141_312}, 184_320),
        ("430m", 430_397_440, {2: 124_928, 3: 248_832, 4: 372_736}, 491_520),
        ("1.5b", 1_515_106_304, {2: 249_856, 3: 497_664, 4: 745_472}, 983_040),
        ("3b", 2_984_627_200, {2: 414_720, 3: 826_880, 4: 1_239_040}, 1_638_400),
    ],
)
def test_perspectives_add_the_published_share_of_parameters(size, plain, added, state):
    base = families()["rwkv4"].presets[size]
    count = sum(math.prod(shape) for shape in families()["rwkv4"].tensor_shapes(base).values())
    assert count == plain
    for n, extra in added.items():
        config = around("rwkv4", base, n)
        shapes = FAMILY.tensor_shapes(config)
        assert added_parameters(config) == extra
        assert sum(math.prod(shape) for shape in shapes.values()) == plain + extra
        assert config.state_nbytes(tokens_seen=9, batch=1, itemsize=4) == n * state
    if size in ("1.5b", "3b"):
        assert 0.0004 < added[4] / plain < 0.0005  # "as little as 0.04%"


def test_later_versions_have_more_mixing_vectors():
    kinds = {"rwkv4": 5, "rwkv5": 6, "rwkv6": 8, "rwkv7": 7}
    for base, count in kinds.items():
        config = configure("temporal-perspectives", base=base, perspectives=4)[1]
        want = 3 * count * config.hidden_size * config.num_hidden_layers + 4 * config.hidden_size
        assert added_parameters(config) == want
    assert added_parameters(around("rwkv7", families()["rwkv7"].presets["1.5b"], 4)) == 1_040_384


@pytest.mark.parametrize("preset", FAMILY.presets)
def test_base_and_sizes_are_read_off_the_tensors(preset):
    config = FAMILY.presets[preset]
    shapes = FAMILY.tensor_shapes(config)
    assert recognise(shapes) is FAMILY
    read = FAMILY.config_from_shapes(shapes)
    assert (read.base, read.perspectives) == (config.base, config.perspectives)
    assert FAMILY.tensor_shapes(read) == shapes


def test_the_published_layout_has_a_first_axis_for_the_perspectives():
    shapes = FAMILY.tensor_shapes(FAMILY.presets["169m"])
    assert shapes["blocks.3.att.time_mix_k"] == (4, 1, 1, 768)
    assert shapes["blocks.3.ffn.time_mix_r"] == (4, 1, 1, 768)
    assert shapes["convert3.weight"] == (4, 768)
    assert shapes["blocks.3.att.time_decay"] == (768,)


@pytest.mark.parametrize("base", BASES)
def test_sizes_not_given_follow_the_base(base):
    config = create(base=base, hidden_size=128)
    assert config.base_config == BASES[base].create(
        hidden_size=128, vocab_size=config.vocab_size, num_hidden_layers=config.num_hidden_layers
    )


def test_a_file_of_perspectives_without_a_model_is_refused():
    with pytest.raises(BadCheckpoint, match=r"convert3\.weight is there, but no model that perspectives are added to"):
        FAMILY.config_from_shapes({"convert3.weight": (4, 32)})
