"""Reader of llama2.c model files (version 0): a header of seven int32, then float32 weights in a fixed order."""

import math
import os
import struct
from dataclasses import asdict
from pathlib import Path

import numpy as np

from rookery.checkpoints.source import Source, in_memory
from rookery.errors import BadCheckpoint
from rookery.families.transformer import TransformerConfig

HEADER = struct.Struct("<7i")

Order = list[tuple[str, int, tuple[int, ...]]]
"""Name, number of layers that have it one after the other, shape."""


def read_llama2c(path: str | os.PathLike[str]) -> tuple[TransformerConfig, dict[str, np.ndarray]]:
    """Config and weights, under the names of `rookery.families.transformer`; BadCheckpoint if the size does not fit."""
    raw = Path(path).read_bytes()
    config, order = _plan(raw[: HEADER.size], os.fspath(path))
    size = HEADER.size + 4 * _numbers(order)
    if len(raw) != size:
        raise BadCheckpoint(f"{os.fspath(path)!r} has {len(raw)} bytes, its header announces {size}")
    numbers, at, weights = np.frombuffer(raw, "<f4", offset=HEADER.size), 0, {}
    for name, repeats, shape in order:
        for i in range(repeats):
            count = math.prod(shape)
            weights[name.format(i)] = numbers[at : at + count].reshape(shape)
            at += count
    del weights["rotary tables"]  # computed from rope_theta instead
    for name, weight in weights.items():
        if "q_proj" in name or "k_proj" in name:
            weights[name] = _halves_from_pairs(weight, config.head_dim)
    return config, weights


def is_llama2c(path: str | os.PathLike[str]) -> bool:
    """True if a file's first numbers announce exactly its size: the format has no other mark."""
    with open(path, "rb") as file:
        start = file.read(HEADER.size)
    try:
        _config, order = _plan(start, os.fspath(path))
    except BadCheckpoint:
        return False
    return os.stat(path).st_size == HEADER.size + 4 * _numbers(order)


def read_llama2c_source(path: str | os.PathLike[str]) -> Source:
    """The file as `open_checkpoint` wants it."""
    config, weights = read_llama2c(path)
    return Source("llama2c", {name: in_memory(weight) for name, weight in weights.items()}, hints=asdict(config))


def _plan(header: bytes, where: str) -> tuple[TransformerConfig, Order]:
    """The config in a header, and what follows it in the file."""
    if len(header) < HEADER.size:
        raise BadCheckpoint(f"{where!r} has {len(header)} bytes; a llama2.c file starts with a header of {HEADER.size}")
    width, ffn, layers, heads, kv_heads, vocab, context = HEADER.unpack(header)
    if min(width, ffn, layers, heads, kv_heads, context) < 1 or vocab == 0 or width % heads or heads % kv_heads:
        raise BadCheckpoint(f"{where!r} is no llama2.c file: its header says width {width}, heads {heads}")
    dim = width // heads
    if dim % 2:
        raise BadCheckpoint(f"{where!r} is no llama2.c file: rotary embeddings need an even head size, it says {dim}")
    config = TransformerConfig(
        vocab_size=abs(vocab),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=dim,
        intermediate_size=ffn,
        tie_word_embeddings=vocab > 0,  # the format marks a separate head by a negative vocabulary size
    )
    keys, at = kv_heads * dim, "model.layers.{}."
    order = [
        ("model.embed_tokens.weight", 1, (config.vocab_size, width)),
        (at + "input_layernorm.weight", layers, (width,)),
        (at + "self_attn.q_proj.weight", layers, (width, width)),
        (at + "self_attn.k_proj.weight", layers, (keys, width)),
        (at + "self_attn.v_proj.weight", layers, (keys, width)),
        (at + "self_attn.o_proj.weight", layers, (width, width)),
        (at + "post_attention_layernorm.weight", layers, (width,)),
        (at + "mlp.gate_proj.weight", layers, (ffn, width)),
        (at + "mlp.down_proj.weight", layers, (width, ffn)),
        (at + "mlp.up_proj.weight", layers, (ffn, width)),
        ("model.norm.weight", 1, (width,)),
        ("rotary tables", 1, (2, context, dim // 2)),
        *([] if vocab > 0 else [("lm_head.weight", 1, (config.vocab_size, width))]),
    ]
    return config, order


def _numbers(order: Order) -> int:
    return sum(repeats * math.prod(shape) for _, repeats, shape in order)


def _halves_from_pairs(weight: np.ndarray, dim: int) -> np.ndarray:
    """llama2.c rotates channels (2i, 2i + 1) together, our transformer (i, i + dim/2): reorder each head's rows."""
    return weight.reshape(-1, dim // 2, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
