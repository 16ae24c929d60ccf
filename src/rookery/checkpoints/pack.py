"""Packed matrices: weights of 8 or 4 bits with a scale for each group of inputs, as the compiled runtime reads them.

The layout is that of `native/core/matrix.hpp`, which describes it. Packing needs the compiled module; unpacking is
NumPy, so that every machine reads packed files. A packed file is a safetensors file of our own convention in which each
packed matrix is a tensor of bytes; its metadata "packed" describe them: {"version": "pack-1", "tensors": {NAME:
{"format": …, "order": …, "shape": [out, in]}}}.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from rookery.checkpoints.source import BFLOAT16, Packed, Stored
from rookery.errors import BackendUnavailable, BadCheckpoint

VERSION = "pack-1"
"""Version of the layout and of its description."""
FORMATS = ("int8", "int4")
"""What `quantize` and `convert` may name."""
BITS = {"int8": 8, "q8_0": 8, "int4": 4, "q4_0": 4}
GROUP = {"int8": 64, "q8_0": 32, "int4": 32, "q4_0": 32}
"""Inputs that share a scale."""
LEVELS = {
    "int4": np.array([-127, -98, -77, -60, -45, -31, -19, -6, 6, 19, 31, 45, 60, 77, 98, 127], np.float32),
    "q4_0": np.arange(-8, 8, dtype=np.float32),
}
PANEL, LINE = 16, 64
"""Outputs of a panel, bytes of a line."""


def aligned(nbytes: int) -> np.ndarray:
    """Uninitialised bytes that start at a cache line."""
    memory = np.empty(nbytes + LINE, np.uint8)
    start = -memory.ctypes.data % LINE
    return memory[start : start + nbytes]


def packed_size(format: str, order: str, out: int, inputs: int) -> int:
    """Bytes of a packed matrix."""
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
