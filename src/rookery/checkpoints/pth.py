"""`.pth` files as `torch.save` writes them since 1.6: a zip with a pickle and one file per storage.

Nothing is executed and torch is not needed. Storages are mapped where they lie in the zip, so a tensor costs nothing
until it is used.
"""

import math
import os
import struct
import zipfile
from functools import partial
from typing import Any

import numpy as np

from rookery.checkpoints.source import Source, Stored, map_file, short
from rookery.checkpoints.unpickle import PickledTensor, unpickle
from rookery.errors import BadCheckpoint

WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "model_ema")
"""Keys under which training programs put the weights, the likeliest first."""
PREFIXES = ("module.", "_orig_mod.", "_forward_module.")
"""What wrappers of torch put in front of every name (DDP, compile, Lightning)."""
MAX_PICKLE = 16_000_000
"""Bytes of data.pkl; a model of ten thousand tensors needs three million."""
LOCAL_HEADER = 30
"""Bytes of the fixed part in front of every file of a zip."""


def read_pth(path: str | os.PathLike[str]) -> Source:
    """Tensors of a `.pth` file; BadCheckpoint if it is damaged or holds anything but tensors, numbers and text."""
    where, data = os.fspath(path), map_file(path)
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {info.filename: info for info in archive.infolist()}
    # zipfile was not written for hostile files: damage surfaces as any of these
    except (
        zipfile.BadZipFile,
        OSError,
        ValueError,
        NotImplementedError,
        OverflowError,
        LookupError,
        struct.error,
    ) as damage:
        raise BadCheckpoint(f"{where!r} is damaged or cut short: it is not a whole zip file ({damage})") from None
    pickles = [name for name in entries if name == "data.pkl" or (name.count("/") == 1 and name.endswith("/data.pkl"))]
    if len(pickles) != 1:
        raise BadCheckpoint(
            f"{where!r} is a zip file but no .pth: it has {len(pickles)} files named data.pkl; torch.save writes one"
        )
    root = pickles[0].removesuffix("data.pkl")
    if root + "byteorder" in entries:
        order = _contents(data, entries[root + "byteorder"], where).tobytes()
        if order != b"little":
            raise BadCheckpoint(f"{where!r} was saved on a machine of byte order {order[:20]!r}; only little is read")
    table = _contents(data, entries[pickles[0]], where)
    if len(table) > MAX_PICKLE:
        raise BadCheckpoint(
            f"{where!r}: its table of tensors has {len(table):,} bytes; a model's has less than a million"
        )
    state = _state_dict(unpickle(table.tobytes(), where), where)

    spans: dict[str, np.ndarray] = {}

    def storage(key: str) -> np.ndarray:
        if key not in spans:
            entry = entries.get(f"{root}data/{key}")
            if entry is None:
                raise BadCheckpoint(f"{where!r} is damaged: the numbers of storage {short(key)} are not in it")
            spans[key] = _contents(data, entry, where)
        return spans[key]

    tensors = {name: _stored(tensor, storage(tensor.storage.key), name, where) for name, tensor in state.items()}
    return Source("pth", _without_prefix(tensors))


def _contents(data: np.ndarray, entry: zipfile.ZipInfo, where: str) -> np.ndarray:
    """The bytes of one file of the zip, still in the mapped file."""
    start = entry.header_offset
    fixed = data[start : start + LOCAL_HEADER].tobytes() if 0 <= start <= len(data) else b""
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
        raise BadCheckpoint(
            f"{where!r}: {short(entry.filename)} is compressed or encrypted; torch.save stores files as they are. "
            "Unpack it and zip it again with `zip -0`"
        )
    if len(fixed) < LOCAL_HEADER or fixed[:4] != b"PK\3\4":
        raise BadCheckpoint(f"{where!r} is damaged: {short(entry.filename)} is not where the zip says")
    # the copy of name and extra field in front of the data may be longer than in the directory: torch pads it to align
    names = int.from_bytes(fixed[26:28], "little") + int.from_bytes(fixed[28:30], "little")
    begin = start + LOCAL_HEADER + names
    if begin + entry.file_size > len(data) or entry.file_size != entry.compress_size:
        raise BadCheckpoint(f"{where!r} is damaged or cut short: {short(entry.filename)} reaches past its end")
    return data[begin : begin + entry.file_size]


def _stored(tensor: PickledTensor, span: np.ndarray, name: str, where: str) -> Stored:
    """The tensor as a view of its storage, every number of it checked to lie inside."""
    item = tensor.dtype.itemsize
    announced = tensor.storage.count * tensor.storage.dtype.itemsize
    numbers = min(len(span), announced) // item
    count = math.prod(tensor.shape)
    last = tensor.offset + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.strides, strict=True))
    if announced > len(span):
        raise BadCheckpoint(
            f"{where!r} is damaged or cut short: {short(name)} needs a storage of {announced:,} bytes, "
            f"{len(span):,} are there"
        )
    if (count and last >= numbers) or count > numbers:
        # more numbers than the storage has would mean repeating some: a small file could ask for terabytes
        raise BadCheckpoint(
            f"{where!r} is damaged: {short(name)} has {count:,} numbers from {tensor.offset:,} on, "
            f"its storage has {numbers:,}"
        )
    read = partial(_view, span, tensor)
    return Stored(tensor.shape, tensor.dtype, read, tensor.dtype.name, count * item)


def _view(span: np.ndarray, tensor: PickledTensor) -> np.ndarray:
    item = tensor.dtype.itemsize
    if math.prod(tensor.shape) == 0:
        return np.empty(tensor.shape, tensor.dtype)
    strides = [step * item for step in tensor.strides]
    return np.ndarray(tensor.shape, tensor.dtype, buffer=span, offset=tensor.offset * item, strides=strides)


def _state_dict(content: Any, where: str) -> dict[str, PickledTensor]:
    """The dictionary of tensors in what was saved, out of any wrapping."""
    for _depth in range(3):
        if not isinstance(content, dict):
            raise BadCheckpoint(f"{where!r} holds a {type(content).__name__}, not a dictionary of tensors")
        if "_strategy" in content:
            raise BadCheckpoint(
                f"{where!r} was converted by ChatRWKV for one strategy, its weights are rescaled or quantised; "
                "use the original .pth"
            )
        if any(isinstance(value, PickledTensor) for value in content.values()):
            break
        inner = next((content[key] for key in WRAPPERS if isinstance(content.get(key), dict)), None)
        if inner is None:
            break
        content = inner
    tensors = {name: value for name, value in content.items() if isinstance(value, PickledTensor)}
    if not tensors and "state" in content and "param_groups" in content:
        raise BadCheckpoint(f"{where!r} holds the state of an optimiser, no model; the weights are in another file")
    if not tensors or not all(isinstance(name, str) for name in tensors):
        raise BadCheckpoint(
            f"{where!r} holds no tensors under names; its keys are {', '.join(map(short, list(content)[:5]))}"
        )
    return tensors


def _without_prefix(tensors: dict[str, Stored]) -> dict[str, Stored]:
    for prefix in PREFIXES * 2:  # wrappers come in any order
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors
