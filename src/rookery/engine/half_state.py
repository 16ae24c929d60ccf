"""States that wait, in 16 bits: half the room for a small error, which `benchmarks/snapshots.py` measures."""

from __future__ import annotations

from collections.abc import Mapping

import ml_dtypes
import numpy as np

from rookery.engine.runners.protocol import RowState
from rookery.errors import UnknownName

HALVES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}
"""float16 has eight times finer steps, bfloat16 float32's range."""


class HalfState:
    """The numbers of a `RowState`, each in 16 bits at most. It cannot go on itself: `Runner.init_state` takes them."""

    def __init__(self, tensors: Mapping[str, np.ndarray]) -> None:
        self._tensors = tensors

    @property
    def tokens_seen(self) -> int:
        """Tokens whose effect is in the state."""
        return int(self._tensors["tokens_seen"][0])

    @property
    def nbytes(self) -> int:
        """Bytes of the numbers in it."""
        return sum(tensor.nbytes for name, tensor in self._tensors.items() if name != "tokens_seen")

    def copy(self) -> HalfState:
        """Itself: nothing changes it."""
        return self

    def tensors(self) -> dict[str, np.ndarray]:
        """All tensors under their names in state files."""
        return dict(self._tensors)


def check_dtype(dtype: str) -> None:
    """UnknownName for what states cannot be kept in."""
    if dtype != "float32" and dtype not in HALVES:
        raise UnknownName(f"states are kept in float32, {' or '.join(HALVES)}, not in {dtype!r}")


def halved(state: RowState, dtype: str) -> HalfState:
    """`state` in "bfloat16" or "float16". A tensor with a number beyond the type's range stays as it is."""
    return HalfState({name: _narrow(tensor, HALVES[dtype]) for name, tensor in state.tensors().items()})


def _narrow(tensor: np.ndarray, dtype: np.dtype) -> np.ndarray:
    if not np.issubdtype(tensor.dtype, np.floating) or tensor.dtype.itemsize <= dtype.itemsize:
        return tensor
    with np.errstate(over="ignore"):
        narrow = tensor.astype(dtype)
    return narrow if np.isfinite(narrow.astype(np.float32)).all() else tensor
