"""What people hand in, as series of float32; or an error that names the series and the point."""

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np


def histories(inputs: Any, names: Sequence[str] | None = None) -> list[np.ndarray]:
    """Series float32 [points] from one series, a list of series, or a matrix [series, points].

    `names` are what errors call them, "series 0" and so on unless given.
    """
    found = [inputs] if getattr(inputs, "ndim", 0) == 1 else list(inputs)
    if not found:
        raise ValueError("there is no series to forecast; give at least one")
    if np.ndim(found[0]) == 0 and not isinstance(found[0], str):  # a plain list of points
        found = [inputs]
    return [history(values, names[i] if names else f"series {i}") for i, values in enumerate(found)]


def history(values: Any, name: str) -> np.ndarray:
    """One series float32 [points], NaN where missing; ValueError for no points, for text and for infinite values."""
    try:
        wide = np.asarray(values, np.float64)
    except (TypeError, ValueError) as reason:
        raise ValueError(f"{name} must hold numbers, NaN where missing: {reason}") from None
    if wide.ndim != 1 or not len(wide):
        raise ValueError(f"{name} must be [points] with at least one point, got shape {list(wide.shape)}")
    with np.errstate(over="ignore"):
        narrow = wide.astype(np.float32)
    if (bad := np.flatnonzero(np.isinf(narrow))).size:
        raise ValueError(
            f"point {bad[0]} of {name} is infinite or too large for float32 ({wide[bad[0]]}); use NaN for a value that "
            "is missing"
        )
    return narrow


def check_observed(values: np.ndarray, context: int, name: str) -> None:
    """ValueError if there is nothing among the last `context` points [points] to forecast from."""
    if np.isnan(values[-context:]).all():
        which = f"any of its last {context} points" if len(values) > context else "any of its points"
        raise ValueError(f"{name} has no observed value at {which}; nothing follows from that")


def whole(name: str, value: Any, least: int = 1) -> int:
    """`value` as a whole number; ValueError that calls it `name` if it is none, or below `least`."""
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be a whole number, got {value!r}") from None
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}")
    return number
