"""Reads the pickle inside a `.pth` file without executing anything.

Python's own unpickler calls whatever a file names. This one interprets the few opcodes that a dictionary of tensors
needs, knows the few names of torch that stand in such files, and refuses everything else. Tensors come out as
descriptions (`PickledTensor`): where their numbers lie, not the numbers.
"""

import io
import pickletools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from rookery.checkpoints.source import MAX_DIMENSIONS, MAX_SIZE
from rookery.errors import BadCheckpoint

STORAGES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
    "UntypedStorage": np.uint8,
}
"""Class of a storage -> type of its numbers."""
DTYPES = {
    "float64": np.float64,
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
    **{name: getattr(np, name) for name in ("int8", "int16", "int32", "int64")},
    **{name: getattr(np, name) for name in ("uint8", "uint16", "uint32", "uint64")},
    "bool": np.bool_,
}
"""torch.<name> -> type of the numbers."""


class Storage(NamedTuple):
    """A run of numbers in a file of its own inside the zip; where it was saved ("cuda:0") does not matter."""

    key: str
    """Name of the file under data/."""
    dtype: np.dtype
    count: int
    """Numbers announced."""


@dataclass(frozen=True)
class PickledTensor:
    """A strided view of a storage; offset and strides count numbers of `dtype`, not bytes."""

    storage: Storage
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


MAX_ARGUMENTS = 16
"""Of a call; a file that passes the same long tuple to many calls would keep us copying."""


class Refused(Exception):
    """What the pickle holds or asks for that no dictionary of tensors needs."""


class _Known(NamedTuple):
    """A name of torch or Python that may stand in the pickle: what it does with its arguments, and what it is."""

    call: Callable[..., Any] | None = None
    value: Any = None


_MARK = object()


def _whole(value: Any) -> int:
    if type(value) is not int or not 0 <= value < MAX_SIZE:
        raise Refused("a tensor whose place, shape or strides are no sizes")
    return value


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_ignored: Any, dtype: np.dtype | None = None) -> Any:
    if not isinstance(storage, Storage) or not isinstance(shape, tuple) or not isinstance(strides, tuple):
        raise Refused("a tensor without storage or shape")
    if len(shape) != len(strides) or len(shape) > MAX_DIMENSIONS:
        raise Refused(f"a tensor of {len(shape)} dimensions with {len(strides)} strides")
    sizes, steps = tuple(map(_whole, shape)), tuple(map(_whole, strides))
    return PickledTensor(storage, dtype or storage.dtype, _whole(offset), sizes, steps)


def _tensor_of_dtype(
    storage: Any, offset: Any, shape: Any, strides: Any, _grad: Any, _hooks: Any, dtype: Any, *_ignored: Any
) -> Any:
    if not isinstance(dtype, np.dtype):
        raise Refused("a tensor of unknown type")
    return _tensor(storage, offset, shape, strides, dtype=dtype)


def _parameter(tensor: Any, *_ignored: Any) -> Any:
    if not isinstance(tensor, PickledTensor):
        raise Refused("a parameter that is no tensor")
    return tensor


def _ordered() -> dict:
    return {}


def _size(sizes: Any = ()) -> tuple:
    if not isinstance(sizes, tuple) or len(sizes) > MAX_DIMENSIONS:
        raise Refused("a size that is none")
    return sizes


KNOWN: dict[tuple[str, str], _Known] = {
    ("collections", "OrderedDict"): _Known(_ordered),
    ("torch", "Size"): _Known(_size),
    ("torch", "device"): _Known(lambda *_where: None),
    ("torch._utils", "_rebuild_tensor"): _Known(_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): _Known(_tensor),
    ("torch._utils", "_rebuild_tensor_v3"): _Known(_tensor_of_dtype),
    ("torch._utils", "_rebuild_parameter"): _Known(_parameter),
    ("torch._utils", "_rebuild_parameter_with_state"): _Known(_parameter),
    ("torch.nn.parameter", "Parameter"): _Known(_parameter),
    **{("torch", name): _Known(value=np.dtype(dtype)) for name, dtype in DTYPES.items()},
    **{
        (module, name): _Known(value=(name, np.dtype(dtype)))
        for module in ("torch", "torch.cuda", "torch.storage")
        for name, dtype in STORAGES.items()
    },
}
"""Everything that a pickle may name. Nothing here reaches outside this file."""


def unpickle(data: bytes, where: str) -> Any:
    """What a pickle holds: dictionaries, lists, tuples, texts, numbers, PickledTensors; BadCheckpoint for all else."""
    try:
        with warnings.catch_warnings():  # texts of pickle protocol 0 may hold escapes that Python frowns upon
            warnings.simplefilter("ignore")
            return _Machine().run(data)
    except Refused as refused:
        raise BadCheckpoint(f"{where!r} is not a plain file of tensors: it holds {refused}") from None
    except (ValueError, TypeError, IndexError, KeyError, AttributeError, RecursionError, OverflowError) as damage:
        # pickletools reports damage by any of these; their texts quote the file and help nobody
        raise BadCheckpoint(
            f"{where!r} is damaged: its table of tensors cannot be read ({type(damage).__name__})"
        ) from None


class _Machine:
    """The pickle virtual machine, without its dangerous half."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, data: bytes) -> Any:
        for opcode, argument, _position in pickletools.genops(io.BytesIO(data)):
            name = opcode.name
            if name == "STOP":
                return self.stack.pop()
            if name in _PUSHES_ARGUMENT:
                self.stack.append(argument)
            elif name in _CONSTANTS:
                self.stack.append(_CONSTANTS[name])
            elif name in _FRESH:
                self.stack.append(_FRESH[name]())
            elif name in _WITH_ARGUMENT:
                _WITH_ARGUMENT[name](self, argument)
            elif name in _STEPS:
                _STEPS[name](self)
            elif name not in _NOTHING:
                raise Refused(f"an object that needs the pickle operation {name}")
        raise ValueError("no end")

    def above_mark(self) -> list[Any]:
        """Takes what was pushed since the last mark."""
        for at in range(len(self.stack) - 1, -1, -1):
            if self.stack[at] is _MARK:
                taken = self.stack[at + 1 :]
                del self.stack[at:]
                return taken
        raise ValueError("no mark")

    def pop(self, count: int) -> list[Any]:
        if count > len(self.stack):
            raise ValueError("stack is empty")
        taken = self.stack[-count:]
        del self.stack[-count:]
        return taken

    def remember(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def name(self, module: Any, name: Any) -> None:
        known = KNOWN.get((module, name)) if isinstance(module, str) and isinstance(name, str) else None
        if known is None:
            shown = ".".join(part[:60] for part in (module, name) if isinstance(part, str))
            raise Refused(
                f"the name {shown!r}, which could run code when loaded; it was not run. "
                "Save only the tensors: torch.save(model.state_dict(), path)"
            )
        self.stack.append(known if known.call else known.value)

    def reduce(self) -> None:
        known, arguments = self.pop(2)
        if not isinstance(known, _Known) or known.call is None or not isinstance(arguments, tuple):
            raise Refused("a call of something that cannot be called")
        if len(arguments) > MAX_ARGUMENTS:
            raise Refused(f"a call with {len(arguments)} arguments")
        self.stack.append(known.call(*arguments))

    def storage(self) -> None:
        (parts,) = self.pop(1)
        # the sixth part, a view of the storage, stands in files of torch before 1.6 only
        match parts[:6] if isinstance(parts, tuple) else ():
            case ("storage", (str(), np.dtype() as dtype), str(key), _location, int(count), *_view):
                self.stack.append(Storage(key, dtype, _whole(count)))
            case _:
                raise Refused("a reference that is no storage of numbers")

    def build(self) -> None:
        # the attributes that torch hangs onto a state dict (_metadata) are of no use here
        _attributes = self.stack.pop()
        if not isinstance(self.stack[-1], dict):
            raise Refused("an object with attributes of its own")

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            raise ValueError("items for something that is no dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            _put(target, key, value)

    def extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, list):
            raise ValueError("items for something that is no list")
        target.extend(items)


def _put(target: dict, key: Any, value: Any) -> None:
    # hashing a deeply shared tuple takes for ever, printing a huge number as well; no state dict has such keys
    if not isinstance(key, str) and not (isinstance(key, int) and abs(key) < MAX_SIZE):
        raise Refused("a dictionary whose keys are no names")
    target[key] = value


_PUSHES_ARGUMENT = frozenset(
    {
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
        *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "STRING", "BINSTRING", "SHORT_BINSTRING"),
        *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
    }
)
_NOTHING = frozenset({"PROTO", "FRAME"})
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "MARK": _MARK, "EMPTY_TUPLE": ()}
_FRESH: dict[str, Callable[[], Any]] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_SET": list}
_WITH_ARGUMENT: dict[str, Callable[[_Machine, Any], None]] = {
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), _Machine.remember),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), lambda m, index: m.stack.append(m.memo[index])),
    "GLOBAL": lambda m, names: m.name(*names.split(" ", 1)),
}
_STEPS: dict[str, Callable[[_Machine], Any]] = {
    "POP": lambda m: m.pop(1),
    "POP_MARK": _Machine.above_mark,
    "DUP": lambda m: m.stack.append(m.stack[-1]),
    "MEMOIZE": lambda m: m.remember(len(m.memo)),
    "TUPLE": lambda m: m.stack.append(tuple(m.above_mark())),
    "TUPLE1": lambda m: m.stack.append(tuple(m.pop(1))),
    "TUPLE2": lambda m: m.stack.append(tuple(m.pop(2))),
    "TUPLE3": lambda m: m.stack.append(tuple(m.pop(3))),
    "LIST": lambda m: m.stack.append(m.above_mark()),
    "DICT": lambda m: (items := m.above_mark(), m.stack.append({}), m.set_items(items)),
    "SETITEM": lambda m: m.set_items(m.pop(2)),
    "SETITEMS": lambda m: m.set_items(m.above_mark()),
    "APPEND": lambda m: m.extend(m.pop(1)),
    "APPENDS": lambda m: m.extend(m.above_mark()),
    "ADDITEMS": lambda m: m.extend(m.above_mark()),
    "STACK_GLOBAL": lambda m: m.name(*m.pop(2)),
    "REDUCE": _Machine.reduce,
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.storage,
}
