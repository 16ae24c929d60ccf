"""Reader of llama2.c model files (version 0): a header of seven int32, then float32 weights in a fixed order."""

import os
import struct
from pathlib import Path

import numpy as np

from rookery.errors import BadCheckpoint
from rookery.families.transformer import TransformerConfig


def read_llama2c(path: str | os.PathLike[str]) -> tuple[TransformerConfig, dict[str, np.ndarray]]:
    """Config and weights, under the names of `rookery.families.transformer`; BadCheckpoint if the size does not fit."""
    raw = Path(path).read_bytes()
    if len(raw) < 28:
        raise BadCheckpoint(f"{os.fspath(path)!r} has {len(raw)} bytes; a llama2.c file starts with a header of 28")
    width, ffn, layers, heads, kv_heads, vocab, context = struct.unpack("<7i", raw[:28])
    if min(width, ffn, layers, heads, kv_heads, context) < 1 or width % heads or heads % kv_heads:
        raise BadCheckpoint(f"{os.fspath(path)!r} is no llama2.c file: its header says width {width}, heads {heads}")
    config = TransformerConfig(
        vocab_size=abs(vocab),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=width // heads,
        intermediate_size=ffn,
        tie_word_embeddings=vocab > 0,  # the format marks a separate head by a negative vocabulary size
    )
    dim, keys = config.head_dim, kv_heads * config.head_dim
    attention, mlp = "model.layers.{}.self_attn.{}_proj.weight", "model.layers.{}.mlp.{}_proj.weight"
    order = [
        ("model.embed_tokens.weight", None, (config.vocab_size, width)),
        ("model.layers.{}.input_layernorm.weight", layers, (width,)),
        (attention.replace("{}_", "q_"), layers, (width, width)),
        (attention.replace("{}_", "k_"), layers, (keys, width)),
        (attention.replace("{}_", "v_"), layers, (keys, width)),
        (attention.replace("{}_", "o_"), layers, (width, width)),
        ("model.layers.{}.post_attention_layernorm.weight", layers, (width,)),
        (mlp.replace("{}_", "gate_"), layers, (ffn, width)),
        (mlp.replace("{}_", "down_"), layers, (width, ffn)),
        (mlp.replace("{}_", "up_"), layers, (ffn, width)),
        ("model.norm.weight", None, (width,)),
        ("rotary tables", None, (2, context, dim // 2)),
        *([] if vocab > 0 else [("lm_head.weight", None, (config.vocab_size, width))]),
    ]
    count = sum((n or 1) * int(np.prod(shape)) for _, n, shape in order)
    if len(raw) != 28 + 4 * count:
        raise BadCheckpoint(f"{os.fspath(path)!r} has {len(raw)} bytes, its header announces {28 + 4 * count}")
    numbers, at, weights = np.frombuffer(raw, "<f4", offset=28), 0, {}
    for name, repeats, shape in order:
        for i in range(repeats or 1):
            size = int(np.prod(shape))
            weights[name.format(i)] = numbers[at : at + size].reshape(shape)
            at += size
    del weights["rotary tables"]  # computed from rope_theta instead
    for name, weight in weights.items():
        if "q_proj" in name or "k_proj" in name:
            weights[name] = _halves_from_pairs(weight, dim)
    return config, weights


def _halves_from_pairs(weight: np.ndarray, dim: int) -> np.ndarray:
    """llama2.c rotates channels (2i, 2i + 1) together, ours (i, i + dim/2): reorder the rows of each head."""
    return weight.reshape(-1, dim // 2, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
