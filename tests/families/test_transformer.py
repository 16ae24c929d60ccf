"""The transformer as data: default sizes, and what is read off tensor shapes."""

import pytest

from rookery.errors import BadCheckpoint
from rookery.families.transformer import TransformerConfig, config_from_shapes, create, recognise, tensor_shapes


def test_a_bare_width_makes_a_llama_of_64_channel_heads():
    config = create(hidden_size=512, num_hidden_layers=3)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (8, 8, 64)
    assert config.intermediate_size == 1376  # 8/3 of the width, rounded up to 32
    assert create(hidden_size=96, num_attention_heads=3).head_dim == 32
    assert create(hidden_size=32).num_attention_heads == 1


@pytest.mark.parametrize("choice", [{}, {"qkv_bias": True}, {"tie_word_embeddings": True}, {"num_key_value_heads": 2}])
def test_sizes_are_read_off_the_tensors(choice):
    for width in (256, 2048):
        config = create(hidden_size=width, head_dim=128 if width >= 2048 else 64, num_hidden_layers=2, **choice)
        assert recognise(tensor_shapes(config))
        assert config_from_shapes(tensor_shapes(config)) == config


def test_a_head_size_that_cannot_be_guessed_is_an_error():
    shapes = tensor_shapes(create(hidden_size=32, num_attention_heads=4))
    with pytest.raises(BadCheckpoint, match="the head size is not in the tensors, and 64 does not divide"):
        config_from_shapes(shapes)


def test_a_missing_tensor_is_named():
    shapes = tensor_shapes(create(hidden_size=64))
    del shapes["model.layers.0.self_attn.k_proj.weight"]
    with pytest.raises(BadCheckpoint, match=r"'model\.layers\.0\.self_attn\.k_proj\.weight' is missing"):
        config_from_shapes(shapes)


def test_the_cache_grows_by_keys_and_values_per_token():
    config = TransformerConfig(num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=2, head_dim=16)
    assert config.state_nbytes(tokens_seen=100, batch=2, itemsize=2) == 2 * 3 * 2 * 16 * 100 * 2 * 2
    assert config.state_nbytes(tokens_seen=0, batch=2, itemsize=2) == 0
