"""Writes GGUF files that llama.cpp runs: names, settings and vocabulary as its own converter gives them."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from rookery.checkpoints.atomic import replacing
from rookery.checkpoints.gguf import ARCHITECTURES, OURS
from rookery.checkpoints.source import Stored

TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0", "q4_0": "Q4_0"}
"""What matrices may be written as -> llama.cpp's name."""
BLOCK = 32
"""Weights that share a scale in Q8_0 and Q4_0."""
KEPT_F32 = ("time_mix_first", "time_mix_w1", "time_mix_w2", "time_mix_decay_w1", "time_mix_decay_w2", "lerp")
"""Small matrices that llama.cpp wants in float32."""
LOW_RANK = tuple(f"time_mix_{name}{i}" for name in "avg" for i in "12")
"""Small matrices that llama.cpp never quantises."""
SLICE = 1 << 20
"""Weights that are quantised at once."""
CONTEXT = 1048576
"""What llama.cpp's converter says of models without a limit."""
END_OF_TURN = 261
r"""World's token of "\n\n"."""


def write_gguf(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Stored],
    *,
    family: str,
    config: Any,
    dtype: str | None,
    pieces: Mapping[int, bytes] | None,
    metadata: Mapping[str, str],
    bpe: Mapping[str, Any] | None = None,
) -> None:
    """Writes `tensors` (llama.cpp's names); matrices become `dtype`, one of TYPES, or keep their own.

    `pieces` is the vocabulary by id, None if there is none of that kind; `bpe` one of the other kind that llama.cpp
    has (`tokenizers.gguf_bpe`); `metadata` is kept under a key of our own.
    """
    from gguf import GGUFWriter

    tensors = _with_dummies(tensors) if family in ("rwkv7", "arwkv") else tensors
    kinds = {name: _kind(name, tensor, dtype) for name, tensor in tensors.items()}
    writer = GGUFWriter(None, next(name for name, known in ARCHITECTURES.items() if known == family))
    _describe(writer, family, config, tensors, kinds)
    if bpe is not None:
        _merging_vocabulary(writer, bpe)
    else:
        _vocabulary(writer, pieces, config.vocab_size)
    writer.add_string(OURS, json.dumps(dict(metadata)))
    writer.add_name(metadata.get("general.name") or os.path.splitext(os.path.basename(os.fspath(path)))[0])
    for name, tensor in tensors.items():
        nbytes = _nbytes(tensor.shape, kinds[name])
        writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), nbytes, raw_dtype=kinds[name])
    with replacing(path) as temporary:
        try:
            writer.write_header_to_file(temporary)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for name, tensor in tensors.items():
                writer.write_tensor_data(_packed(tensor, kinds[name]))
        finally:
            writer.close()


def _with_dummies(tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """llama.cpp wants the value residual in the first block, too, and never uses it: copies of the rate's tensors."""
    dummies = {
        f"blk.0.time_mix_v{i}.weight": replace(tensors[f"blk.0.time_mix_a{i}.weight"], nbytes=0) for i in range(3)
    }
    return {**tensors, **dummies}


def _kind(name: str, tensor: Stored, dtype: str | None) -> Any:
    from gguf import GGMLQuantizationType

    stem = name.removesuffix(".weight").split(".")[-1]
    if len([n for n in tensor.shape if n != 1]) < 2 or stem.startswith(KEPT_F32) or "lerp" in stem:
        return GGMLQuantizationType.F32
    kind = TYPES.get(dtype or tensor.dtype.name, "F32")
    if kind.startswith("Q") and (stem in LOW_RANK or tensor.shape[-1] % BLOCK):
        return GGMLQuantizationType.F32
    return GGMLQuantizationType[kind]


def _nbytes(shape: tuple[int, ...], kind: Any) -> int:
    from gguf import GGML_QUANT_SIZES

    weights, size = GGML_QUANT_SIZES[kind]
    return math.prod(shape) // weights * size


def _packed(tensor: Stored, kind: Any) -> np.ndarray:
    """The tensor's bytes in the file, made when it is written."""
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    values = tensor.read()
    if kind == GGMLQuantizationType.BF16 and tensor.dtype.name == "bfloat16":
        return np.ascontiguousarray(values).view(np.uint8)
    if kind == GGMLQuantizationType.F16:
        return np.ascontiguousarray(values, np.float16)
    # a few rows at a time: the package makes several float32 copies of what it is given
    rows = values.reshape(-1, values.shape[-1])
    step = max(1, SLICE // values.shape[-1])
    parts = [quantize(rows[i : i + step].astype(np.float32), kind) for i in range(0, len(rows), step)]
    return np.concatenate(parts).reshape(*values.shape[:-1], -1)


def _describe(writer: Any, family: str, config: Any, tensors: Mapping[str, Stored], kinds: Mapping[str, Any]) -> None:
    """The settings that llama.cpp's loader asks for."""
    from gguf import LlamaFileType

    main = kinds["blk.0.time_mix_key.weight"].name
    names = {"F32": "ALL_F32"}
    writer.add_file_type(LlamaFileType[names.get(main, f"MOSTLY_{main}")])
    writer.add_quantization_version(2)
    writer.add_context_length(CONTEXT)
    writer.add_vocab_size(config.vocab_size)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(0)
    writer.add_wkv_head_size(config.head_dim)
    converted = hasattr(config, "rms_norm_eps")
    writer.add_token_shift_count(1 if converted else 2)
    if converted:
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    else:
        writer.add_layer_norm_eps(config.layer_norm_eps)
    if family in ("rwkv6", "rad-rwkv6"):
        writer.add_rescale_every_n_layers(0)  # nothing is divided: float32 and bfloat16 do not overflow
        if converted:
            writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_time_mix_extra_dim(config.mix_rank)
        writer.add_time_decay_extra_dim(config.decay_rank)
    else:
        writer.add_decay_lora_rank(config.decay_rank)
        writer.add_iclr_lora_rank(config.rate_rank)
        writer.add_value_residual_mix_lora_rank(config.value_rank)
        writer.add_gate_lora_rank(0 if getattr(config, "gate", "") == "none" else config.gate_rank)


def _vocabulary(writer: Any, pieces: Mapping[int, bytes] | None, vocab_size: int) -> None:
    from gguf import TokenType

    if pieces is None:
        writer.add_tokenizer_model("no_vocab")
        return
    tokens, types = [b"<s>"], [TokenType.CONTROL]
    for index in range(1, vocab_size):
        piece = pieces.get(index)
        tokens.append(f"[PAD{index}]".encode() if piece is None else repr(piece)[2:-1].encode())
        types.append(TokenType.UNUSED if piece is None else TokenType.NORMAL)
    writer.add_tokenizer_model("rwkv")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    if pieces.get(END_OF_TURN) == b"\n\n":
        writer.add_eot_token_id(END_OF_TURN)
        writer.add_chat_template("rwkv-world")


def _merging_vocabulary(writer: Any, bpe: Mapping[str, Any]) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(bpe["pre"])
    writer.add_token_list(bpe["tokens"])
    writer.add_token_types(bpe["types"])
    writer.add_token_merges(bpe["merges"])
    writer.add_eos_token_id(bpe["eos"])
    writer.add_add_bos_token(False)
