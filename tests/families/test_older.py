"""RWKV-4, 5 and 6 as data: published sizes, what is read off tensor shapes, and what is refused."""

import math
from dataclasses import replace

import pytest

from rookery.errors import BadCheckpoint
from rookery.families import rwkv4, rwkv5, rwkv6
from rookery.registry import families, recognise

PUBLISHED = {
    "rwkv4-169m": 169_342_464,
    "rwkv4-1.5b": 1_515_106_304,
    "rwkv4-3b": 2_984_627_200,
    "rwkv4-7b": 7_392_649_216,
    "rwkv4-14b": 14_148_597_760,
    "rwkv5-0.1b": 192_807_936,
    "rwkv5-0.4b": 461_721_600,
    "rwkv5-1.5b": 1_577_754_624,
    "rwkv5-3b": 3_062_999_040,
    "rwkv5-7b": 7_518_044_160,
    "rwkv6-1.6b": 1_599_873_024,
    "rwkv6-3b": 3_099_863_040,
    "rwkv6-7b": 7_635_746_816,
    "rwkv6-14b": 14_069_088_256,
}
SMALL = {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 12}
TINY = {
    "4v0-660K": (
        rwkv4.RWKV4Config(vocab_size=256, hidden_size=128, num_hidden_layers=4, intermediate_size=256),
        661_504,
    ),
    "5v1-730K": (rwkv5.RWKV5Config(**SMALL, head_dim=8, intermediate_size=256, decay="head", has_gate=False), 680_640),
    "5v2-730K": (rwkv5.RWKV5Config(**SMALL, head_dim=8, intermediate_size=256), 731_904),
    "6v0-1m": (rwkv6.RWKV6Config(**SMALL, head_dim=8, intermediate_size=224), 1_028_352),
    "6v0-3m": (
        rwkv6.RWKV6Config(**SMALL | {"hidden_size": 128}, head_dim=8, intermediate_size=448),
        3_334_656,
    ),
}
"""rwkv.cpp's test models (core.md 4.1)."""
MODULES = {"rwkv4": rwkv4, "rwkv5": rwkv5, "rwkv6": rwkv6}
PRESETS = [(name, preset) for name, module in MODULES.items() for preset in module.PRESETS]


def count(shapes):
    return sum(math.prod(shape) for shape in shapes.values())


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_published_number_of_parameters(name):
    family, preset = name.split("-")
    module = MODULES[family]
    assert count(module.tensor_shapes(module.PRESETS[preset])) == PUBLISHED[name]


@pytest.mark.parametrize("name", TINY)
def test_the_models_of_rwkv_cpp_have_their_number_of_parameters(name):
    config, parameters = TINY[name]
    shapes = MODULES[f"rwkv{name[0]}"].tensor_shapes(config)
    assert count(shapes) == parameters
    read = MODULES[f"rwkv{name[0]}"].config_from_shapes(shapes)
    assert read == config


@pytest.mark.parametrize(("family", "preset"), PRESETS)
def test_family_and_config_are_read_off_the_tensors(family, preset):
    module = MODULES[family]
    config = module.PRESETS[preset]
    shapes = module.tensor_shapes(config)
    assert recognise(shapes).name == family
    assert not [f.name for f in families().values() if f.name != family and f.recognise(shapes)]
    if config == rwkv6.PRESETS["c-test"]:
        config = replace(config, variant="x060b")  # the same tensors
    # ranks of variants that have no such factors are not in the tensors
    read = module.config_from_shapes(shapes)
    if family == "rwkv6" and config.variant != "x060a":
        read = replace(read, gate_rank=config.gate_rank)
    assert read == config


@pytest.mark.parametrize("family", MODULES)
def test_sizes_that_no_formula_gives_are_read_off_the_tensors(family):
    module = MODULES[family]
    odd = replace(module.PRESETS["test"], vocab_size=11, hidden_size=48, intermediate_size=50, num_hidden_layers=1)
    if family == "rwkv6":
        odd = replace(odd, mix_rank=3, decay_rank=7, gate_rank=64)
    assert module.config_from_shapes(module.tensor_shapes(odd)) == odd


@pytest.mark.parametrize("family", MODULES)
def test_a_missing_tensor_is_named(family):
    module = MODULES[family]
    shapes = module.tensor_shapes(module.PRESETS["test"])
    for name in ("emb.weight", "blocks.0.ffn.key.weight"):
        without = {n: shape for n, shape in shapes.items() if n != name}
        with pytest.raises(BadCheckpoint, match=f"not a whole RWKV-{family[-1]} checkpoint: '{name}' is missing"):
            module.config_from_shapes(without)


@pytest.mark.parametrize("family", MODULES)
def test_the_state_has_as_many_numbers_as_published(family):
    config = MODULES[family].PRESETS["7b"]
    width, layers = config.hidden_size, config.num_hidden_layers
    numbers = 5 * layers * width if family == "rwkv4" else layers * (2 * width + 64 * width)
    assert config.state_nbytes(tokens_seen=9, batch=1, itemsize=4) == 4 * numbers


def test_new_models_get_the_official_widths_and_ranks():
    assert rwkv4.create(hidden_size=512).intermediate_size == 2048
    assert rwkv5.create(hidden_size=512).intermediate_size == 1792
    assert rwkv6.create(hidden_size=528, head_dim=16).intermediate_size == 1824  # 1848, rounded down to 32
    small, large = rwkv6.create(hidden_size=2048), rwkv6.create(hidden_size=4096)
    assert (small.mix_rank, small.decay_rank) == (32, 64)
    assert (large.mix_rank, large.decay_rank) == (64, 128)
    assert rwkv6.create(variant="x060b").group_norm_eps == 1e-5
    for module in (rwkv5, rwkv6):
        with pytest.raises(ValueError, match=r"hidden_size \(100\) must be a multiple of head_dim \(64\)"):
            module.create(hidden_size=100)


EXPERIMENTS = {
    "blocks.0.ffnPre.key.weight": "a channel mix in the place of the first time mix",
    "blocks.2.tiny_q.weight": r"a small attention beside a channel mix \(tiny_att\)",
    "head_q.weight": "a head that copies earlier tokens",
    "blocks.0.pos_emb_x": "position embeddings of images",
    "blocks.1.att.qq.weight": "an attention inside the time mix",
    "blocks.1.att.time_mix_kk": "an attention inside the time mix",
    "blocks.0.ffn.time_mix": "one mix for all of r, k and v, which is RWKV-2",
}


@pytest.mark.parametrize("family", ["rwkv4", "rwkv5"])
@pytest.mark.parametrize("extra", EXPERIMENTS)
def test_experiments_are_refused_by_the_name_of_their_tensor(family, extra):
    module = MODULES[family]
    shapes = module.tensor_shapes(module.PRESETS["test"]) | {extra: (1, 1)}
    assert recognise(shapes).name == family
    message = f"a variant of RWKV-{family[-1]} that is not supported: '{extra}' belongs to {EXPERIMENTS[extra]}"
    with pytest.raises(BadCheckpoint, match=message):
        module.config_from_shapes(shapes)


def test_experiments_without_a_first_time_mix_and_rwkv_2_are_recognised_to_be_refused():
    shapes = rwkv4.tensor_shapes(rwkv4.PRESETS["test"])
    swapped = {
        name.replace("blocks.0.att", "blocks.0.ffnPre"): shape
        for name, shape in shapes.items()
        if not name.startswith("blocks.0.att.time_") or name.endswith("mix_k")
    }
    second = {name.replace("time_mix_k", "time_mix"): x for name, x in shapes.items() if "_mix_v" not in name}
    for tensors, message in ((swapped, "'blocks.0.ffnPre"), (second, "which is RWKV-2")):
        assert recognise(tensors).name == "rwkv4"
        with pytest.raises(BadCheckpoint, match=message):
            rwkv4.config_from_shapes(tensors)
