"""Reading llama2.c files: on small made-up ones, whole and damaged."""

import struct

import numpy as np
import pytest
import torch

from rookery.checkpoints.llama2c import read_llama2c
from rookery.errors import BadCheckpoint
from rookery.families.transformer import tensor_shapes

DIM, FFN, LAYERS, HEADS, KV_HEADS, VOCAB, CONTEXT = 8, 12, 2, 4, 2, 11, 16


def made(vocab: int = VOCAB) -> bytes:
    """A file whose numbers count up from 0."""
    keys = DIM // HEADS * KV_HEADS
    per_layer = 2 * DIM + 2 * DIM * DIM + 2 * keys * DIM + 3 * DIM * FFN
    count = VOCAB * DIM + LAYERS * per_layer + DIM + CONTEXT * DIM // HEADS + (VOCAB * DIM if vocab < 0 else 0)
    return (
        struct.pack("<7i", DIM, FFN, LAYERS, HEADS, KV_HEADS, vocab, CONTEXT) + np.arange(count, dtype="<f4").tobytes()
    )


@pytest.mark.parametrize("vocab", [VOCAB, -VOCAB])
def test_every_weight_is_found_in_its_place(tmp_path, vocab):
    (tmp_path / "model.bin").write_bytes(made(vocab))
    config, weights = read_llama2c(tmp_path / "model.bin")
    assert (config.hidden_size, config.num_attention_heads, config.num_key_value_heads) == (DIM, HEADS, KV_HEADS)
    assert config.tie_word_embeddings == (vocab > 0)
    assert {name: w.shape for name, w in weights.items()} == tensor_shapes(config)
    assert weights["model.embed_tokens.weight"][0, :3].tolist() == [0, 1, 2]
    # norms of both layers stand together, before the first layer's matrices
    start = VOCAB * DIM
    assert weights["model.layers.1.input_layernorm.weight"][0] == start + DIM
    value = start + 2 * DIM + 2 * DIM * DIM + 2 * (DIM // 2) * DIM  # behind the norms, wq and wk of both layers
    assert weights["model.layers.0.self_attn.v_proj.weight"][0, 0] == value
    if vocab < 0:
        assert weights["lm_head.weight"][-1, -1] == (len(made(vocab)) - 28) // 4 - 1


def test_rotated_pairs_become_rotated_halves(tmp_path):
    """q·k after llama2.c's rotation of neighbours equals q·k after ours of halves."""
    from rookery.models.transformer import rotate

    (tmp_path / "model.bin").write_bytes(made())
    _, weights = read_llama2c(tmp_path / "model.bin")
    dim, position, x = DIM // HEADS, 3, np.linspace(-1, 1, DIM)
    first = VOCAB * DIM + LAYERS * DIM
    original = np.arange(first, first + DIM * DIM, dtype=np.float64).reshape(DIM, DIM)
    pairs = (original @ x).reshape(HEADS, dim // 2, 2)
    angle = position * 10000.0 ** (-2 * np.arange(dim // 2) / dim)
    turned = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angle)
    ours = torch.from_numpy(weights["model.layers.0.self_attn.q_proj.weight"].astype(np.float64) @ x)
    ours = rotate(ours.view(1, HEADS, 1, dim), torch.tensor([[position]]), 10000.0)[0, :, 0]
    np.testing.assert_allclose(ours[:, : dim // 2], turned.real, rtol=1e-5)
    np.testing.assert_allclose(ours[:, dim // 2 :], turned.imag, rtol=1e-5)


@pytest.mark.parametrize("length", [0, 4, 27])
def test_a_file_without_a_whole_header_is_refused(tmp_path, length):
    (tmp_path / "model.bin").write_bytes(made()[:length])
    with pytest.raises(
        BadCheckpoint, match=rf"model\.bin' has {length} bytes; a llama2\.c file starts with a header of 28"
    ):
        read_llama2c(tmp_path / "model.bin")


@pytest.mark.parametrize("cut", [-1, -4, 28])
def test_a_file_cut_short_is_refused(tmp_path, cut):
    whole = made()
    (tmp_path / "model.bin").write_bytes(whole[:cut])
    with pytest.raises(BadCheckpoint, match=rf"has {len(whole[:cut])} bytes, its header announces {len(whole)}"):
        read_llama2c(tmp_path / "model.bin")


def test_a_file_with_something_behind_it_is_refused(tmp_path):
    (tmp_path / "model.bin").write_bytes(made() + b"more")
    with pytest.raises(BadCheckpoint, match="its header announces"):
        read_llama2c(tmp_path / "model.bin")


@pytest.mark.parametrize("field", range(7))
@pytest.mark.parametrize("value", [0, -5, 2**31 - 1])
def test_a_header_that_cannot_be_is_refused(tmp_path, field, value):
    numbers = [DIM, FFN, LAYERS, HEADS, KV_HEADS, VOCAB, CONTEXT]
    numbers[field] = value
    (tmp_path / "model.bin").write_bytes(struct.pack("<7i", *numbers) + made()[28:])
    with pytest.raises(BadCheckpoint, match=r"is no llama2\.c file: its header says|its header announces"):
        read_llama2c(tmp_path / "model.bin")
