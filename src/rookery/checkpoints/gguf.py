"""GGUF, the file format of llama.cpp: reading (core.md 2.3).

A header of counts, settings as typed keys and values, a table of tensors, then aligned data. Tensors are mapped; packed
ones come out as float32, by the `gguf` package.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from rookery.checkpoints.source import BFLOAT16, MAX_SIZE, Packed, Source, Stored, map_file, plain, short
from rookery.errors import BadCheckpoint

VERSIONS = (2, 3)
ARCHITECTURES = {"rwkv6": "rwkv6", "rwkv7": "rwkv7", "arwkv7": "arwkv", "rwkv6qwen2": "rad-rwkv6"}
"""What is read -> its family."""
PLAIN = {0: np.dtype(np.float32), 1: np.dtype(np.float16), 28: np.dtype(np.float64), 30: BFLOAT16}
PACKED = {
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    12: ("Q4_K", 256, 144),
    14: ("Q6_K", 256, 210),
}
"""Number of a type in the file -> its name, weights in a block, bytes of a block."""
NATIVE = ("Q8_0", "Q6_K", "Q4_0")
"""Types whose blocks the compiled runtime multiplies with."""
NUMBERS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
"""Number of a setting's type -> numpy type; 8 is text, 9 a list."""
TEXT, LIST = 8, 9
OURS = "rookery.metadata"
"""Key under which our own files keep the metadata that they were converted with, as JSON."""
MAX_ALIGNMENT = 1 << 20


def read_gguf(path: str | os.PathLike[str]) -> Source:
    """Tensors of a GGUF file under llama.cpp's names; BadCheckpoint if it is damaged or of another architecture."""
    where = os.fspath(path)
    cursor = _Cursor(map_file(path), where)
    cursor.take(4)
    version = cursor.number("<u4")
    if version not in VERSIONS:
        raise BadCheckpoint(f"{where!r} is GGUF version {version}; 2 and 3 are read. Convert the model again")
    tensor_count, key_count = cursor.number("<u8"), cursor.number("<u8")
    settings: dict[str, Any] = {}
    for _ in range(key_count):
        key = cursor.text()
        settings[key] = cursor.value(cursor.number("<u4"))
    architecture = settings.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise BadCheckpoint(
            f"{where!r} is a GGUF file of the architecture {short(architecture)}; {', '.join(ARCHITECTURES)} are read"
        )
    table = [_entry(cursor) for _ in range(tensor_count)]
    alignment = settings.get("general.alignment", 32)
    if type(alignment) is not int or not 0 < alignment <= MAX_ALIGNMENT:
        raise BadCheckpoint(f"{where!r} is damaged: its data are aligned to {short(alignment)}")
    start = cursor.at + -cursor.at % alignment
    tensors: dict[str, Stored] = {}
    for name, shape, kind, offset in table:
        if name in tensors:
            raise BadCheckpoint(f"{where!r} is damaged: tensor {short(name)} is there twice")
        tensors[name] = _tensor(cursor.data, start + offset, name, shape, kind, where)
    return Source("gguf", _as_trained(tensors, settings, where), _metadata(settings, where), _hints(settings))


class _Cursor:
    """Where in the file we are; every read is checked against its end."""

    def __init__(self, data: np.ndarray, where: str) -> None:
        self.data, self.where, self.at = data, where, 0

    def take(self, count: int) -> np.ndarray:
        if count > len(self.data) - self.at:
            raise BadCheckpoint(
                f"{self.where!r} is damaged or cut short: byte {self.at:,} should be followed by {count:,} more, "
                f"{len(self.data) - self.at:,} are left"
            )
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, kind: str) -> Any:
        return self.take(np.dtype(kind).itemsize).view(kind)[0].item()

    def text(self) -> str:
        return self.take(self.number("<u8")).tobytes().decode("utf-8", "surrogateescape")

    def value(self, kind: int) -> Any:
        if kind == TEXT:
            return self.text()
        if kind in NUMBERS:
            return self.number(NUMBERS[kind])
        if kind != LIST:
            raise BadCheckpoint(f"{self.where!r} is damaged: a setting before byte {self.at:,} has type {kind}")
        kind, count = self.number("<u4"), self.number("<u8")
        if kind in NUMBERS:
            return self.take(count * np.dtype(NUMBERS[kind]).itemsize).view(NUMBERS[kind])
        if kind != TEXT:  # lists of lists: allowed by the format, used by nobody
            raise BadCheckpoint(f"{self.where!r}: a list before byte {self.at:,} has members of type {kind}")
        return [self.text() for _ in range(count)]


def _entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """Name, shape, type and place of one tensor."""
    name, dims = cursor.text(), cursor.number("<u4")
    if not 1 <= dims <= 4:
        raise BadCheckpoint(f"{cursor.where!r} is damaged: tensor {short(name)} has {dims} dimensions")
    shape = tuple(cursor.number("<u8") for _ in range(dims))[::-1]  # fastest first in the file
    kind, offset = cursor.number("<u4"), cursor.number("<u8")
    if any(n >= MAX_SIZE for n in (*shape, offset)):
        raise BadCheckpoint(f"{cursor.where!r} is damaged: tensor {short(name)} has shape {list(shape)} at {offset}")
    return name, shape, kind, offset


def _tensor(data: np.ndarray, start: int, name: str, shape: tuple[int, ...], kind: int, where: str) -> Stored:
    count = math.prod(shape)
    if kind in PLAIN:
        nbytes = count * PLAIN[kind].itemsize
    elif kind in PACKED and shape[-1] % PACKED[kind][1] == 0:
        nbytes = count // PACKED[kind][1] * PACKED[kind][2]
    else:
        known = ", ".join(["F32, F16, BF16", *(packed[0] for packed in PACKED.values())])
        raise BadCheckpoint(
            f"{where!r}: tensor {short(name)} of shape {list(shape)} has type {kind}, which is not read; "
            f"known are {known}. Convert the original again with one of these"
        )
    if start + nbytes > len(data):
        raise BadCheckpoint(
            f"{where!r} is damaged or cut short: tensor {short(name)} needs {nbytes:,} bytes at {start:,} of "
            f"{len(data):,}"
        )
    if kind in PLAIN:
        return plain(data, start, shape, PLAIN[kind])
    packed = data[start : start + nbytes]
    name = PACKED[kind][0]
    native = Packed(name.lower(), "blocks", lambda: packed) if name in NATIVE and len(shape) == 2 else None
    return Stored(shape, np.dtype(np.float32), partial(_floats, packed, kind, shape), name, nbytes, native)


def _floats(packed: np.ndarray, kind: int, shape: tuple[int, ...]) -> np.ndarray:
    """The weights of a packed tensor as float32."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    with np.errstate(all="ignore"):  # a damaged scale gives NaN, which is for the reader to judge
        return dequantize(packed.reshape(math.prod(shape[:-1]), -1), GGMLQuantizationType(kind)).reshape(shape)


def _as_trained(tensors: Mapping[str, Stored], settings: Mapping[str, Any], where: str) -> dict[str, Stored]:
    """Undoes what llama.cpp's converter did to values and shapes and no name tells."""
    architecture = settings["general.architecture"]
    head = settings.get(f"{architecture}.wkv.head_size")
    if type(head) is not int or head < 1:
        raise BadCheckpoint(f"{where!r}: the setting '{architecture}.wkv.head_size' is missing")
    # rwkv6: output matrices divided by two once more every so many layers, against overflow of float16
    every = settings.get("rwkv6.rescale_every_n_layers", 0) if architecture == "rwkv6" else 0
    found: dict[str, Stored] = {}
    for name, tensor in tensors.items():
        if name.endswith("time_mix_r_k.weight"):
            found[name] = _reshaped(tensor, head, name, where)
        elif every and name.endswith(("time_mix_output.weight", "channel_mix_value.weight")):
            layer = int(name.split(".")[1])
            found[name] = replace(tensor, read=partial(_times, tensor, 2.0 ** (layer // every)), packed=None)
        else:
            found[name] = tensor
    return found


def _reshaped(tensor: Stored, head: int, name: str, where: str) -> Stored:
    count = math.prod(tensor.shape)
    if count % head:
        raise BadCheckpoint(f"{where!r}: {short(name)} has {count} numbers, no multiple of the head size {head}")
    return replace(tensor, shape=(count // head, head), read=lambda: tensor.read().reshape(-1, head))


def _times(tensor: Stored, factor: float) -> np.ndarray:
    return (tensor.read() * np.asarray(factor, tensor.dtype)).astype(tensor.dtype, copy=False)


def _metadata(settings: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What else the file says: settings as text, our own metadata, the token list as it is."""
    metadata: dict[str, Any] = {
        key: str(value)
        for key, value in settings.items()
        if key.startswith(("general.", "tokenizer.")) and not isinstance(value, list | np.ndarray)
    }
    if isinstance(settings.get("tokenizer.ggml.tokens"), list):
        metadata["tokenizer.ggml.tokens"] = [
            token.encode("utf-8", "surrogateescape") for token in settings["tokenizer.ggml.tokens"]
        ]
    if isinstance(settings.get("tokenizer.ggml.merges"), list):
        metadata["tokenizer.ggml.merges"] = settings["tokenizer.ggml.merges"]
        metadata["tokenizer.ggml.token_type"] = np.asarray(settings.get("tokenizer.ggml.token_type", [])).tolist()
    if OURS in settings:
        try:
            ours = json.loads(settings[OURS])
            metadata |= {str(key): str(value) for key, value in ours.items()}
        except (ValueError, TypeError, AttributeError, RecursionError):
            raise BadCheckpoint(f"{where!r} is damaged: its setting {OURS!r} is no JSON table") from None
    return metadata


def _hints(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a config that the settings name."""
    prefix, hints = settings["general.architecture"], {}
    for key, name in (("layer_norm_epsilon", "layer_norm_eps"), ("layer_norm_rms_epsilon", "rms_norm_eps")):
        eps = settings.get(f"{prefix}.attention.{key}")
        if isinstance(eps, float):
            hints[name] = float(f"{eps:.6g}")  # float32 in the file: 1e-5 has become 9.99999974e-06
    if type(head := settings.get(f"{prefix}.wkv.head_size")) is int:
        hints["head_dim"] = head
    return hints
