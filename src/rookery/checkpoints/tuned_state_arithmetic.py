"""Smaller tuned states, and mixtures of them: files in, files out, without torch.

A tuned matrix usually has a low rank: four per head lost nothing of a published one (state_methods.md 1.2).
"""

import os
from collections.abc import Sequence

import numpy as np

from rookery.checkpoints.safetensors import write_safetensors
from rookery.checkpoints.tuned_state import FIELDS, TunedState, read_tuned_state
from rookery.errors import BadState

TRAINED = ("wkv", "kstate")
"""Fields whose matrices a rank can be cut of."""


def compress(path: str | os.PathLike[str], out: str | os.PathLike[str], *, rank: int) -> float:
    """Writes the tuned state of a file with at most `rank` directions per head, as products of two matrices.

    Gives the share of the squared numbers that is lost, 0 to 1. Where two matrices of that rank would be no smaller
    than one, the one is written. Raises ValueError for a rank below 1, BadState for a file without matrices (RWKV-4's).
    """
    if rank < 1:
        raise ValueError(f"rank must be 1 or more, got {rank}")
    tuned = read_tuned_state(path)
    written: dict[str, np.ndarray] = {}
    lost = total = 0.0
    for name, values in tuned.tensors.items():
        field = name.rpartition(".")[2]
        if field not in TRAINED:
            written[_stored(name)] = values
            continue
        if values.ndim != 3:
            raise BadState(f"{tuned.path!r} holds vectors, as RWKV-4 does; only matrices have a rank")
        left, right = factors(values, rank)
        near = left @ right
        lost += float(np.square(values - near).sum(dtype=np.float64))
        total += float(np.square(values).sum(dtype=np.float64))
        if left.size + right.size < values.size:
            written |= {f"{_stored(name)}_left": left, f"{_stored(name)}_right": right}
        else:
            written[_stored(name)] = near
    write_safetensors(out, _contiguous(written), dict(tuned.metadata))
    return lost / total if total else 0.0


def factors(values: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Matrices [h, v, rank] and [h, rank, k] whose product is nearest to values [h, v, k]."""
    u, s, vt = np.linalg.svd(values.astype(np.float64), full_matrices=False)
    root = np.sqrt(s[:, :rank])
    left, right = u[..., :rank] * root[:, None], root[..., None] * vt[:, :rank]
    return left.astype(np.float32), right.astype(np.float32)


def spectrum(tuned: TunedState) -> list[np.ndarray]:
    """Of every layer the mean over heads of the singular values' squares, the largest first, as shares of their sum."""
    found = []
    for name, values in tuned.tensors.items():
        if name.rpartition(".")[2] in TRAINED and values.ndim == 3:
            squares = np.square(np.linalg.svd(values.astype(np.float64), compute_uv=False)).mean(0)
            found.append(squares / max(squares.sum(), np.finfo(np.float64).tiny))
    return found


def mix(
    paths: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str], *, weights: Sequence[float] | None = None
) -> None:
    """Writes the weighted sum of tuned states of one model (equal weights that make 1, unless given).

    BadState for states of different models or forms, or kernel states with other support vectors: only what is read in
    one way adds up.
    """
    if not paths:
        raise ValueError("there is nothing to mix; give two files or more")
    weights = [1 / len(paths)] * len(paths) if weights is None else list(weights)
    if len(weights) != len(paths):
        raise ValueError(f"{len(paths)} states need as many weights, got {len(weights)}")
    states = [read_tuned_state(path) for path in paths]
    first = states[0]
    for other in states[1:]:
        _check_alike(first, other)
    mixed: dict[str, np.ndarray] = {}
    for name in dict.fromkeys(name for state in states for name in state.tensors):
        if name.endswith((".support", ".rule")):
            mixed[_stored(name)] = first.tensors[name]
        else:  # shift vectors of zeros are left out of files
            mixed[_stored(name)] = sum(w * s.tensors[name] for w, s in zip(weights, states) if name in s.tensors)
    write_safetensors(out, _contiguous(mixed), dict(first.metadata))


def _check_alike(one: TunedState, other: TunedState) -> None:
    def of(state: TunedState) -> dict[str, tuple[int, ...]]:
        return {name: values.shape for name, values in state.tensors.items() if not name.endswith("_shift")}

    told = [{k: state.metadata.get(k) for k in ("family", "config", "model")} for state in (one, other)]
    if of(one) != of(other) or (all(state.metadata for state in (one, other)) and told[0] != told[1]):
        raise BadState(f"{one.path!r} and {other.path!r} are states of different models or forms; they cannot be mixed")
    apart = [n for n in of(one) if n.endswith((".support", ".rule")) and (one.tensors[n] != other.tensors[n]).any()]
    if apart:
        raise BadState(f"{one.path!r} and {other.path!r} are read through different kernels; tune one from the other")


def _stored(name: str) -> str:
    _, layer, field = name.split(".")
    return f"blocks.{layer}.{FIELDS[field]}"


def _contiguous(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: np.ascontiguousarray(array, np.float32) for name, array in arrays.items()}
