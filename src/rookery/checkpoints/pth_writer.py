"""Writes `.pth` files that `torch.load(path, weights_only=True)` reads, without torch and one tensor at a time.

A zip of uncompressed files: `data.pkl`, a pickle that names every tensor, its shape and its storage; `data/N`, the
numbers of storage N. The pickle is put together from the few operations that a dictionary of tensors needs.
"""

import math
import os
import struct
import zipfile
from collections.abc import Mapping

import numpy as np

from rookery.checkpoints.atomic import replacing
from rookery.checkpoints.source import BFLOAT16, Stored, write_values

ROOT = "archive"
ALIGNMENT = 64
"""Bytes; torch starts every storage at a multiple, so that it can be mapped."""
STORAGES = {
    np.dtype(np.float64): "DoubleStorage",
    np.dtype(np.float32): "FloatStorage",
    np.dtype(np.float16): "HalfStorage",
    BFLOAT16: "BFloat16Storage",
}
LARGE = 1 << 31
"""Bytes; from here on a file of a zip needs the longer header."""


def write_pth(path: str | os.PathLike[str], tensors: Mapping[str, Stored]) -> None:
    """Writes `tensors` under their names; the file is whole or absent."""
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        _add(archive, "data.pkl", _table(tensors))
        _add(archive, "byteorder", b"little")
        for key, tensor in enumerate(tensors.values()):
            nbytes = math.prod(tensor.shape) * tensor.dtype.itemsize
            entry = _entry(archive, f"data/{key}", nbytes)
            with archive.open(entry, "w", force_zip64=nbytes >= LARGE) as file:
                write_values(file, tensor)
        _add(archive, "version", b"3\n")


def _add(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    archive.writestr(_entry(archive, name, len(content)), content)


def _entry(archive: zipfile.ZipFile, name: str, nbytes: int) -> zipfile.ZipInfo:
    """A file of the zip, its header padded so that its contents start aligned. The date is always the same."""
    entry = zipfile.ZipInfo(f"{ROOT}/{name}")
    entry.file_size = nbytes
    begin = archive.fp.tell() + 30 + len(entry.filename) + 4 + (20 if nbytes >= LARGE else 0)
    padding = -begin % ALIGNMENT
    entry.extra = b"FB" + struct.pack("<H", padding) + b"Z" * padding  # the mark that torch uses for its padding
    return entry


def _table(tensors: Mapping[str, Stored]) -> bytes:
    """The pickle, of protocol 2."""
    items = b"".join(_text(name) + _tensor(key, tensor) for key, (name, tensor) in enumerate(tensors.items()))
    return b"\x80\x02" + _ORDERED + b"(" + items + b"u."


_ORDERED = b"ccollections\nOrderedDict\n)R"


def _tensor(key: int, tensor: Stored) -> bytes:
    """torch._utils._rebuild_tensor_v2(storage, 0, shape, strides, False, OrderedDict())"""
    count = math.prod(tensor.shape)
    strides = [math.prod(tensor.shape[i + 1 :]) for i in range(len(tensor.shape))]
    storage_class = f"ctorch\n{STORAGES[tensor.dtype]}\n".encode()
    storage = b"(" + _text("storage") + storage_class + _text(str(key)) + _text("cpu") + _whole(count) + b"tQ"
    sizes = b"".join(b"(" + b"".join(map(_whole, numbers)) + b"t" for numbers in (tensor.shape, strides))
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + _whole(0) + sizes + b"\x89" + _ORDERED + b"tR"


def _text(text: str) -> bytes:
    data = text.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _whole(number: int) -> bytes:
    if number < 1 << 31:
        return b"J" + struct.pack("<i", number)
    data = number.to_bytes(number.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data
