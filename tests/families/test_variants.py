"""The variants of RWKV-7 as data: what is read off tensor shapes, and whom they are not taken for."""

import pytest

from rookery.errors import BadCheckpoint
from rookery.registry import families, recognise

VARIANTS = [name for name in families() if name.startswith(("rwkv7", "rwkv8", "rosa"))]


@pytest.mark.parametrize("name", VARIANTS)
def test_every_size_is_read_off_the_tensors(name):
    family = families()[name]
    for preset in family.presets:
        config = family.presets[preset]
        shapes = family.tensor_shapes(config)
        assert recognise(shapes) is family
        read = family.config_from_shapes(shapes, **{field: getattr(config, field) for field in family.not_in_shapes})
        assert read == config, preset


@pytest.mark.parametrize("name", ["rwkv7a", "rwkv7b"])
def test_the_size_of_a_bare_family_follows_its_width(name):
    config = families()[name].create(hidden_size=128)
    assert (config.hidden_size, config.intermediate_size, config.embed_rank) == (128, 512, 32)


def test_the_smallest_7a_release_has_the_published_tables():
    family = families()["rwkv7a"]
    shapes = family.tensor_shapes(family.presets["0.1b"])
    assert shapes["blocks.11.ffn.s_emb.weight"] == (65536, 1024)
    assert shapes["blocks.11.ffn.s_emb_x.weight"] == (1024, 768)
    assert shapes["blocks.0.ffn.s2"] == (32, 3072)


def test_a_7b_cache_keeps_64_numbers_a_token_and_block():
    config = families()["rwkv7b"].presets["0.1b"]
    one, two = (config.state_nbytes(tokens_seen=n, batch=1, itemsize=2) for n in (1, 2))
    assert two - one == 12 * 64 * 2 + 8


@pytest.mark.parametrize(
    ("name", "missing", "said"),
    [
        ("rwkv7b", "blocks.0.qkv.k1", "not a whole RWKV-7b checkpoint: 'blocks.0.qkv.k1' is missing"),
        ("rwkv8-hybrid", "blocks.0.qkv.kk.weight", "not a whole RWKV-8 hybrid checkpoint: 'blocks.0.qkv.kk.weight'"),
        ("rosa", "blocks.0.ffn.key.weight", "not a whole ROSA checkpoint: 'blocks.0.ffn.key.weight' is missing"),
        ("rwkv7-rosa", "e.weight", "not a whole RWKV-7 . ROSA checkpoint: 'e.weight' is missing"),
    ],
)
def test_a_missing_tensor_is_named(name, missing, said):
    family = families()[name]
    shapes = family.tensor_shapes(family.presets["test"])
    del shapes[missing]
    with pytest.raises(BadCheckpoint, match=said):
        family.config_from_shapes(shapes)


def test_tables_without_square_matrices_are_refused():
    family = families()["rwkv7a"]
    shapes = family.tensor_shapes(family.presets["test"]) | {"blocks.0.ffn.s_emb.weight": (64, 15)}
    with pytest.raises(BadCheckpoint, match="has 15 numbers a token, which make no square matrix"):
        family.config_from_shapes(shapes)


def test_only_the_first_norm_after_the_embedding_is_used():
    unused = families()["rosa"].is_unused
    assert unused("blocks.11.ln0.bias")
    assert not unused("blocks.0.ln0.bias")
    assert not unused("blocks.1.ln2.bias")


def test_a_norm_that_the_hybrid_demo_does_not_apply_is_unused():
    assert families()["rwkv8-hybrid"].is_unused("blocks.0.ln0.weight")
    assert not families()["rwkv8"].is_unused("blocks.0.ln0.weight")


@pytest.mark.parametrize("name", ["rwkv8", "rwkv8-hybrid"])
def test_a_bare_preview_of_8_has_the_sizes_of_7(name):
    config = families()[name].create(hidden_size=128)
    assert (config.intermediate_size, config.head_dim) == (512, 64)
