"""Packed matrices: weights of 8 or 4 bits with a scale for each group of inputs, as the compiled runtime reads them.

The layout is that of `native/core/matrix.hpp`, which describes it. Packing needs the compiled module; unpacking is
NumPy, so that every machine reads packed files. A packed file is a safetensors file of our own convention in which each
packed matrix is a tensor of bytes; its metadata "packed" describe them: {"version": "pack-1", "tensors": {NAME:
{"format": …, "order": …, "shape": [out, in]}}}.
"""

import json
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from rookery.checkpoints.source import BFLOAT16, Packed, Stored, short
from rookery.errors import BackendUnavailable, BadCheckpoint

VERSION = "pack-1"
"""Version of the layout and of its description."""
FORMATS = ("int8", "int4")
"""What `quantize` and `convert` may name."""
BITS = {"int8": 8, "q8_0": 8, "q6_k": 6, "int4": 4, "q4_0": 4}
GROUP = {"int8": 64, "q8_0": 32, "int4": 32, "q4_0": 32}
"""Inputs that share a scale."""
LEVELS = {
    "int4": np.array([-127, -101, -79, -62, -47, -34, -21, -9, 2, 14, 25, 36, 50, 65, 83, 107], np.float32),
    "q4_0": np.arange(-8, 8, dtype=np.float32),
}
FAMILIES = ("rwkv4", "rwkv5", "rwkv6", "rwkv7")
"""Families whose matrices can be packed."""
HEAD = {"int4": "int8"}
"""Format of the head where it is another one than that of the other matrices."""
PANEL, LINE = 16, 64
"""Outputs of a panel, bytes of a line."""


BY_COLUMNS = ".ffn.value.weight"
"""Ending of the matrices whose inputs are often zero, which the runtime reads by columns."""


def plan(checkpoint: Any, quantize: str) -> dict[str, tuple[str, str]]:
    """Official name -> (format, order) of each tensor that becomes packed: the large matrices but the embedding.

    Vectors, low-rank factors and norms carry the dynamics and are a few percent of a step's bytes; of the embedding
    only the rows of the tokens at hand are read. BadCheckpoint for a family that the runtime does not know.
    """
    if checkpoint.family.name not in FAMILIES:
        raise BadCheckpoint(
            f"{checkpoint.path!r} is a model of the family {checkpoint.family.name}; {', '.join(FAMILIES)} can be "
            f"quantised as {quantize}"
        )
    return {
        name: (HEAD.get(quantize, quantize) if name == "head.weight" else quantize, order_of(name))
        for name, tensor in checkpoint.tensors.items()
        if name.endswith(".weight") and len(tensor.shape) == 2 and name != "emb.weight"
    }


def order_of(name: str) -> str:
    """How the runtime reads a matrix."""
    return "columns" if name.endswith(BY_COLUMNS) else "rows"


def packed_tensors(
    checkpoint: Any, tensors: Mapping[str, Stored], quantize: str | None
) -> tuple[dict[str, Stored], dict[str, str]]:
    """`tensors` of `checkpoint` as a packed file has them, made when they are read; and metadata that describe them.

    Matrices that have no more bits than asked for keep their bytes; without `quantize` only those are packed.
    """
    wanted = plan(checkpoint, quantize) if quantize else {}
    written: dict[str, Stored] = {}
    table: dict[str, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        format, order = wanted.get(name, ("", ""))
        has = tensor.packed
        if has is not None and has.format in FORMATS and (not format or BITS[has.format] <= BITS[format]):
            format, order, read = has.format, has.order, has.data
        elif format:
            read = partial(_packed, tensor, format, order)
        else:
            written[name] = tensor
            continue
        size = packed_size(format, order, *tensor.shape)
        written[name] = Stored((size,), np.dtype(np.uint8), read, format, size)
        table[name] = {"format": format, "order": order, "shape": list(tensor.shape)}
    return written, {"packed": json.dumps({"version": VERSION, "tensors": table})} if table else {}


def _packed(tensor: Stored, format: str, order: str) -> np.ndarray:
    return pack(tensor.read(), format, order)


def described(tensors: Mapping[str, Stored], metadata: Mapping[str, str], where: str) -> dict[str, Stored]:
    """The tensors of a file, those that its metadata describe as packed with the numbers that they stand for."""
    if "packed" not in metadata:
        return dict(tensors)
    try:
        told = json.loads(metadata["packed"])
        if told["version"] != VERSION:
            raise BadCheckpoint(
                f"{where!r} was packed by another version of rookery ({short(told['version'])}); this one reads "
                f"{VERSION!r}. Convert the original again"
            )
        return {name: _described(tensor, told["tensors"].get(name)) for name, tensor in tensors.items()}
    except BadCheckpoint:
        raise
    except (ValueError, TypeError, LookupError, AttributeError):
        raise BadCheckpoint(f"{where!r} is damaged: what it says of its packed tensors does not fit them") from None


def _described(tensor: Stored, how: Any) -> Stored:
    if how is None:
        return tensor
    format, order, (out, inputs) = how["format"], how["order"], how["shape"]
    if not isinstance(format, str) or not isinstance(order, str):
        raise ValueError
    sizes_fit = all(type(n) is int and 0 <= n < 1 << 31 for n in (out, inputs))
    if format not in FORMATS or order not in ("rows", "columns") or not sizes_fit:
        raise ValueError
    if tensor.dtype != np.uint8 or tensor.shape != (packed_size(format, order, out, inputs),):
        raise ValueError
    return Stored(
        (out, inputs),
        np.dtype(np.float32),
        lambda: unpack(tensor.read(), format, order, (out, inputs)),
        format,
        tensor.nbytes,
        Packed(format, order, tensor.read),
    )


def for_runtime(name: str, tensor: Stored, wanted: tuple[str, str] | None) -> tuple[np.ndarray, str, str] | None:
    """Bytes, format and order in which the compiled runtime takes a matrix; None where it takes floats.

    `wanted` is the tensor's entry in a `plan`. Bytes of our own files stay mapped; blocks of GGUF files are laid out
    anew, which keeps their numbers.
    """
    has = tensor.packed
    if has is not None and (wanted is None or BITS[has.format] <= BITS[wanted[0]]):
        if has.order != "blocks":
            return has.data(), has.format, has.order
        order = order_of(name)
        if has.format != "q6_k" or order == "rows":  # its scales are too many to be read with every column
            return repack(has.data(), has.format, order, tensor.shape), has.format, order
    if wanted is None:
        return None
    return pack(tensor.read(), *wanted), *wanted


def repack(blocks: np.ndarray, format: str, order: str, shape: tuple[int, ...]) -> np.ndarray:
    """The bytes of a GGUF tensor's blocks, "q8_0", "q4_0" or, for the order "rows", "q6_k", as a packed matrix."""
    from rookery import _native

    out, inputs = shape
    packed = aligned(packed_size(format, order, out, inputs))
    _native.repack(np.ascontiguousarray(blocks).reshape(-1), format, order, out, inputs, packed)
    return packed


def aligned(nbytes: int) -> np.ndarray:
    """Uninitialised bytes that start at a cache line."""
    memory = np.empty(nbytes + LINE, np.uint8)
    start = -memory.ctypes.data % LINE
    return memory[start : start + nbytes]


def packed_size(format: str, order: str, out: int, inputs: int) -> int:
    """Bytes of a packed matrix."""
    if format == "q6_k":
        scales = -(-(inputs // 256 * 2 + inputs // 16) * PANEL // LINE) * LINE
        return -(-out // PANEL) * (scales + inputs * PANEL * 6 // 8)
    bits, group = BITS[format], GROUP[format]
    groups = -(-inputs // group)
    if order == "rows":
        scales = -(-groups * PANEL * 2 // LINE) * LINE
        return -(-out // PANEL) * (scales + groups * group * PANEL * bits // 8)
    lines = -(-out // (LINE * 8 // bits))
    return groups * (lines * (LINE * 8 // bits) * 2 + group * lines * LINE)


def pack(matrix: np.ndarray, format: str, order: str = "rows", threads: int = 0) -> np.ndarray:
    """The bytes of float `matrix` [out, in] as "int8" or "int4", in the order "rows" or "columns"."""
    try:
        from rookery import _native
    except ImportError as error:
        raise BackendUnavailable(
            f"quantising needs the compiled module, which is missing ({error}); reinstall rookery on a machine with a "
            "C++20 compiler"
        ) from None
    matrix = np.ascontiguousarray(matrix)
    if matrix.dtype == BFLOAT16:
        matrix = matrix.view(np.uint16)
    elif matrix.dtype not in (np.float32, np.float16):
        matrix = matrix.astype(np.float32)
    packed = aligned(packed_size(format, order, *matrix.shape))
    _native.pack(matrix, format, order, packed, threads)
    return packed


def unpack(packed: np.ndarray, format: str, order: str, shape: tuple[int, int]) -> np.ndarray:
    """float32 [out, in]: the weights that the bytes stand for."""
    out, inputs = shape
    bits, group = BITS[format], GROUP[format]
    groups = -(-inputs // group)
    if order == "rows":
        panels = packed.reshape(-(-out // PANEL), -1)
        size = groups * group * PANEL * bits // 8
        scales = panels[:, : groups * PANEL * 2].copy().view(np.float16).reshape(-1, groups, PANEL)
        lines = panels[:, panels.shape[1] - size :].reshape(len(panels), -1, 1, LINE)
        numbers = _numbers(lines, format).reshape(len(panels), -1, PANEL, 4)
        weights = numbers.swapaxes(1, 2).reshape(len(panels), PANEL, groups, group)
        scaled = weights * scales.swapaxes(1, 2)[..., None].astype(np.float32)
        return scaled.reshape(len(panels) * PANEL, -1)[:out, :inputs]
    lines = -(-out // (LINE * 8 // bits))
    blocks = packed.reshape(groups, -1)
    size = group * lines * LINE
    scales = blocks[:, : blocks.shape[1] - size].copy().view(np.float16).astype(np.float32)
    rows = _numbers(blocks[:, blocks.shape[1] - size :].reshape(groups, group, lines, 1, LINE), format)
    rows = rows.reshape(groups, group, -1, 4, 4, 4).swapaxes(3, 4).reshape(groups, group, -1)
    return (rows * scales[:, None]).reshape(groups * group, -1)[:inputs, :out].T


def _numbers(lines: np.ndarray, format: str) -> np.ndarray:
    """Numbers of lines [..., 1, 64] as float32: [..., 1 or 2, 64]."""
    if BITS[format] == 8:
        return lines.astype(np.float32) - 128
    return LEVELS[format][np.concatenate([lines & 15, lines >> 4], axis=-2)]
