"""Safetensors files: read without copying, written whole or not at all.

Our own model files are safetensors with official tensor names and these metadata, all strings: `rookery` (version of
this convention), `family`, `config` (JSON), `fingerprint` and, where known, `tokenizer`.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import ml_dtypes
import numpy as np

from rookery.checkpoints.atomic import replacing
from rookery.checkpoints.lite import plain as plain_model
from rookery.checkpoints.pack import described
from rookery.checkpoints.source import BFLOAT16, Source, Stored, check_shape, map_file, plain, short, write_values
from rookery.errors import BadCheckpoint

CONVENTION = "model-1"
"""Version of our metadata."""
MAX_HEADER = 100_000_000
"""Bytes; the format's own limit."""
ALIGNMENT = 64
"""Bytes; our files start their data at a multiple, so that vector loads from a mapped file are aligned."""

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": BFLOAT16,
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def read_safetensors(path: str | os.PathLike[str]) -> Source:
    """Tensors and metadata of a safetensors file; BadCheckpoint if it is damaged."""
    where, data = os.fspath(path), map_file(path)
    length = int.from_bytes(data[:8].tobytes(), "little")
    if len(data) < 8 or length > min(MAX_HEADER, len(data) - 8):
        raise BadCheckpoint(
            f"{where!r} is damaged or cut short: its header should have {length:,} bytes, the file has {len(data):,}"
        )
    try:
        header = json.loads(data[8 : 8 + length].tobytes())
    except (ValueError, RecursionError):
        raise BadCheckpoint(f"{where!r} is damaged: its safetensors header is not JSON") from None
    if not isinstance(header, dict):
        raise BadCheckpoint(f"{where!r} is damaged: its safetensors header is not a table of tensors")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise BadCheckpoint(f"{where!r} is damaged: its metadata are not text")
    body = data[8 + length :]
    tensors = {name: _tensor(body, name, entry, where) for name, entry in header.items()}
    stated = described(tensors, metadata, where)
    lite = stated if "lite" in metadata else {}
    return Source("safetensors", plain_model(stated, metadata, where), metadata, lite=lite)


def _tensor(body: np.ndarray, name: str, entry: Any, where: str) -> Stored:
    if not isinstance(entry, dict):
        raise BadCheckpoint(f"{where!r} is damaged: tensor {short(name)} is not described")
    shape = check_shape(entry.get("shape"), name, where)
    kind, offsets = entry.get("dtype"), entry.get("data_offsets")
    dtype = DTYPES.get(kind) if isinstance(kind, str) else None
    if dtype is None:
        raise BadCheckpoint(f"{where!r}: tensor {short(name)} is of type {short(kind)}; known are {', '.join(DTYPES)}")
    if not isinstance(offsets, list) or len(offsets) != 2 or any(type(n) is not int for n in offsets):
        raise BadCheckpoint(f"{where!r} is damaged: tensor {short(name)} has no place in the file")
    start, end = offsets
    announced = math.prod(shape) * dtype.itemsize
    if not 0 <= start <= end <= len(body) or end - start != announced:
        raise BadCheckpoint(
            f"{where!r} is damaged or cut short: tensor {short(name)} needs {announced:,} bytes at {start:,} "
            f"of {len(body):,}"
        )
    return plain(body, start, shape, dtype)


def write_safetensors(
    path: str | os.PathLike[str], tensors: Mapping[str, np.ndarray | Stored], metadata: Mapping[str, str]
) -> None:
    """Writes `tensors` in their order, one at a time in memory; the file is whole or absent."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    # packed matrices, which fill whole cache lines, then wide types first, so that every tensor starts at a multiple of
    # its item size
    order = sorted(tensors, key=lambda name: -(tensors[name].dtype.itemsize if tensors[name].dtype != np.uint8 else 64))
    for name in order:
        shape, dtype = tensors[name].shape, np.dtype(tensors[name].dtype)
        if dtype not in NAMES:
            raise ValueError(f"safetensors files cannot hold {dtype} ({name}); convert it to a float type first")
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            write_values(file, tensors[name])


def write_model(
    path: str | os.PathLike[str],
    tensors: Mapping[str, np.ndarray | Stored],
    *,
    family: str,
    config: Any,
    fingerprint: str,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a model under its official tensor names; `metadata` may add "tokenizer" and other text."""
    ours = {
        "format": "pt",  # what other safetensors readers expect; our own mark is "rookery"
        "rookery": CONVENTION,
        "family": family,
        "config": json.dumps(asdict(config)),
        "fingerprint": fingerprint,
    }
    write_safetensors(path, tensors, {**(metadata or {}), **ours})
