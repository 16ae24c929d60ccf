"""ggmf, the file format of rwkv.cpp, plain and quantised (core.md 2.4).

Six int32 of header, then tensors one after the other until the file ends, unaligned. Quantised tensors come out as
float32: 32 weights share a scale, and in some types a minimum.
"""

import math
import os
import struct
from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import numpy as np

from rookery.checkpoints.atomic import replacing
from rookery.checkpoints.source import Source, Stored, map_file, plain, short, write_values
from rookery.errors import BadCheckpoint

MAGIC = 0x67676D66
HEADER = 24
"""Bytes: magic, version, vocabulary, width, layers, type."""
VERSIONS = (100, 101)
BLOCK = 32
"""Weights that share a scale."""


class Packed(NamedTuple):
    """A block format: `minimum` follows the scale where there is one; 5-bit types keep their top bits in `high`."""

    name: str
    bits: int
    has_minimum: bool
    zero: int
    """The stored number that means 0."""

    @property
    def layout(self) -> np.dtype:
        """One block as a numpy record."""
        parts: list[tuple] = [("scale", "<f2")]
        if self.has_minimum:
            parts.append(("minimum", "<f2"))
        if self.bits == 5:
            parts.append(("high", "<u4"))
        parts.append(("q", "i1", BLOCK) if self.bits == 8 else ("q", "u1", BLOCK // 2))
        return np.dtype(parts)


PLAIN = {0: np.dtype(np.float32), 1: np.dtype(np.float16)}
PACKED = {
    2: Packed("Q4_0", 4, False, 8),
    3: Packed("Q4_1", 4, True, 0),
    7: Packed("Q5_0", 5, False, 16),
    8: Packed("Q5_1", 5, True, 0),
    9: Packed("Q8_0", 8, False, 0),
}
"""Number of a type in the file -> its format."""


def read_ggmf(path: str | os.PathLike[str]) -> Source:
    """Tensors of a ggmf file under its names; BadCheckpoint if it is damaged or uses a removed type."""
    where, data = os.fspath(path), map_file(path)
    header = np.frombuffer(data[: HEADER - HEADER % 4].tobytes()[: len(data) // 4 * 4], "<i4")
    if len(header) < HEADER // 4:
        raise BadCheckpoint(f"{where!r} is cut short: a ggmf file starts with {HEADER} bytes, this has {len(data)}")
    version = int(header[1])
    if version not in VERSIONS:
        raise BadCheckpoint(
            f"{where!r} is ggmf version {version}; 100 and 101 are read. Convert it again with rwkv.cpp"
        )
    tensors: dict[str, Stored] = {}
    at = HEADER
    while at < len(data):
        name, tensor, at = _tensor(data, at, where)
        if name in tensors:
            raise BadCheckpoint(f"{where!r} is damaged: tensor {short(name)} is there twice")
        tensors[name] = tensor
    return Source("ggmf", tensors, {"version": str(version)})


def _tensor(data: np.ndarray, at: int, where: str) -> tuple[str, Stored, int]:
    """The tensor that starts at byte `at`, and where the next one does."""

    def take(count: int, what: str) -> np.ndarray:
        nonlocal at
        if not 0 <= count <= len(data) - at:
            raise BadCheckpoint(
                f"{where!r} is damaged or cut short: {what} at byte {at:,} needs {count:,} bytes, "
                f"{len(data) - at:,} are left"
            )
        at += count
        return data[at - count : at]

    dims, name_length, kind = (int(n) for n in take(12, "a tensor's head").view("<i4"))
    if not 1 <= dims <= 4:
        raise BadCheckpoint(f"{where!r} is damaged: the tensor at byte {at - 12:,} has {dims} dimensions")
    shape = tuple(int(n) for n in take(4 * dims, "a tensor's shape").view("<i4")[::-1])  # fastest first in the file
    try:
        name = take(name_length, "a tensor's name").tobytes().decode()
    except UnicodeDecodeError:
        raise BadCheckpoint(f"{where!r} is damaged: the name before byte {at:,} is not UTF-8") from None
    if any(n < 0 for n in shape):
        raise BadCheckpoint(f"{where!r} is damaged: tensor {short(name)} has shape {list(shape)}")
    count = math.prod(shape)
    if kind in PLAIN:
        start = at
        take(count * PLAIN[kind].itemsize, f"tensor {short(name)}")
        return name, plain(data, start, shape, PLAIN[kind]), at
    packed = PACKED.get(kind)
    if packed is None or shape[-1] % BLOCK:
        raise BadCheckpoint(
            f"{where!r}: tensor {short(name)} of shape {list(shape)} has type {kind}; known are F32, F16 and, for rows "
            f"of a multiple of {BLOCK}, {', '.join(p.name for p in PACKED.values())}"
        )
    blocks = take(count // BLOCK * packed.layout.itemsize, f"tensor {short(name)}")
    stored = Stored(shape, np.dtype(np.float32), partial(_floats, blocks, packed, shape), packed.name, len(blocks))
    return name, stored, at


def _floats(blocks: np.ndarray, packed: Packed, shape: tuple[int, ...]) -> np.ndarray:
    """The weights of a packed tensor as float32."""
    records = blocks.view(packed.layout)
    q = records["q"]
    if packed.bits < 8:
        q = np.concatenate([q & 15, q >> 4], axis=1)  # byte j holds weights j and j + 16
    if packed.bits == 5:
        q = q | ((records["high"][:, None] >> np.arange(BLOCK, dtype=np.uint32) & 1) << 4).astype(np.uint8)
    with np.errstate(all="ignore"):  # a damaged scale gives NaN or infinite weights, which is for the reader to judge
        weights = (q.astype(np.float32) - packed.zero) * records["scale"][:, None].astype(np.float32)
        if packed.has_minimum:
            weights += records["minimum"][:, None].astype(np.float32)
    return weights.reshape(shape)


def write_ggmf(
    path: str | os.PathLike[str], tensors: Mapping[str, Stored], *, vocab_size: int, width: int, layers: int
):
    """Writes float32 and float16 `tensors`, named and shaped as rwkv.cpp wants them; the file is whole or absent."""
    kinds = {dtype: kind for kind, dtype in PLAIN.items()}
    most = max(kinds[tensor.dtype] for tensor in tensors.values())
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(struct.pack("<6i", MAGIC, VERSIONS[-1], vocab_size, width, layers, most))
        for name, tensor in tensors.items():
            label, shape = name.encode(), tensor.shape[::-1]
            file.write(struct.pack(f"<{3 + len(shape)}i", len(shape), len(label), kinds[tensor.dtype], *shape) + label)
            write_values(file, tensor)
