"""What every reader returns: the tensors of one file, known by name, shape and type before any of them is read."""

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import ml_dtypes
import numpy as np

from rookery.errors import BadCheckpoint

MAX_DIMENSIONS = 8
"""More than any model uses; a file that announces more is damaged."""
MAX_SIZE = 2**48
"""Of one dimension, offset or stride; larger numbers are damage, and slow to compute with and to print."""


@dataclass(frozen=True)
class Packed:
    """A matrix of 8 or 4 bits as its file has it."""

    format: str
    """"int8" or "int4", laid out as in `rookery.checkpoints.pack`; "q8_0", "q6_k" or "q4_0", blocks of a GGUF file."""
    order: str
    """"rows", "columns" or "blocks"."""
    data: Callable[[], np.ndarray]
    """The bytes, mapped."""


@dataclass(frozen=True)
class Stored:
    """One tensor of a file."""

    shape: tuple[int, ...]
    """Its shape, slowest dimension first."""
    dtype: np.dtype
    """Type of the numbers that `read` returns."""
    read: Callable[[], np.ndarray]
    """The values, read-only; a view of the mapped file wherever its bytes can be used as they are."""
    encoding: str
    """How the file keeps the numbers: the dtype's name, or that of a packed format ("Q5_1")."""
    nbytes: int
    """Bytes in the file."""
    packed: Packed | None = None
    """The bytes of a quantised matrix, for whoever computes with them."""


@dataclass(frozen=True)
class Source:
    """A file or folder of tensors under the file's own names."""

    format: str
    """Name of the file format ("pth", "safetensors", "ggmf")."""
    tensors: Mapping[str, Stored]
    """Name -> tensor, in the file's order."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """What the file says about itself."""
    hints: Mapping[str, object] = field(default_factory=dict)
    """Settings from a config.json beside the file; believed only where the tensors agree."""
    lite: Mapping[str, Stored] = field(default_factory=dict)
    """The tensors of a compressed model as the file has them; see `rookery.checkpoints.lite`."""


BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def map_file(path: str | os.PathLike[str]) -> np.ndarray:
    """The bytes of a file as a read-only uint8 array that is mapped, not read; BadCheckpoint if it is empty."""
    path = Path(path)
    if path.stat().st_size == 0:
        raise BadCheckpoint(f"{str(path)!r} is empty; download or copy it again")
    return np.memmap(path, dtype=np.uint8, mode="r").view(np.ndarray)


def plain(data: np.ndarray, offset: int, shape: tuple[int, ...], dtype: np.dtype) -> Stored:
    """A tensor whose numbers lie in `data` from `offset` on; the caller has checked that they do."""
    nbytes = math.prod(shape) * dtype.itemsize

    def read() -> np.ndarray:
        return data[offset : offset + nbytes].view(dtype).reshape(shape)

    return Stored(shape, dtype, read, dtype.name, nbytes)


def check_shape(shape: object, name: str, path: str) -> tuple[int, ...]:
    """`shape` as a tuple; BadCheckpoint unless it is a short list of whole numbers of at least 0."""
    sizes = tuple(shape) if isinstance(shape, list | tuple) else None
    if sizes is None or len(sizes) > MAX_DIMENSIONS or any(type(n) is not int or not 0 <= n < MAX_SIZE for n in sizes):
        raise BadCheckpoint(f"{path!r} is damaged: tensor {short(name)} has no valid shape")
    return sizes


def short(name: object) -> str:
    """A name from a file, quoted and cut, so that a hostile one cannot flood the message."""
    text = str(name)
    return repr(text if len(text) <= 100 else text[:100] + "…")


def in_memory(array: np.ndarray) -> Stored:
    """A tensor that has been read already."""
    return Stored(array.shape, array.dtype, lambda: array, array.dtype.name, array.nbytes)


def write_values(file: BinaryIO, tensor: Stored | np.ndarray) -> None:
    """Writes the numbers of one tensor, in C order, without a second copy of them."""
    values = tensor.read() if isinstance(tensor, Stored) else tensor
    file.write(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data if values.size else b"")
