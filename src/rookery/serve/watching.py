"""How a state moves while a text is read and written, for whoever wants to see it: the page draws it."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from rookery.engine.runners.protocol import RowState
from rookery.engine.scheduler import Generation

PAUSE = 0.1
"""Seconds between two pictures, at least."""
SHARE = 0.05
"""Of the scheduler's time that pictures may take, at most."""


def norms(state: RowState) -> list[list[float]]:
    """Norm of the recurrent state per layer and head [layers][heads].

    Models without matrices per head give one number a layer.
    """
    found: dict[int, list[float]] = {}
    for name, array in state.tensors().items():
        parts = name.split(".")
        if parts[0] != "layers" or parts[2] not in ("wkv", "keys"):
            continue
        values = np.asarray(array, np.float32)[0]
        axes = tuple(range(1, values.ndim)) if values.ndim == 3 else None
        found[int(parts[1])] = np.atleast_1d(np.sqrt(np.square(values).sum(axis=axes))).tolist()
    return [found[layer] for layer in sorted(found)]


class Progress(NamedTuple):
    """Where a text is."""

    read: int
    """Tokens of the prompt that are in the state."""
    prompt: int
    """Tokens of the prompt."""
    written: int
    norms: list[list[float]]

    def chunk(self) -> dict[str, Any]:
        """What a stream tells of it, beside its choices."""
        return {"choices": [], "progress": self._asdict()}


class Watcher:
    """Looks at the state of one text now and then, on the scheduler's thread."""

    def __init__(self, told: Callable[[Generation], None]) -> None:
        self._told, self._next = told, -float("inf")
        self._latest: Progress | None = None

    def __call__(self, generation: Generation) -> None:
        now = time.monotonic()
        if now < self._next:
            return
        found = norms(generation.session.state)
        self._latest = Progress(generation.read, len(generation.prompt), len(generation.tokens), found)
        self._next = now + max(PAUSE, (time.monotonic() - now) / SHARE)
        self._told(generation)

    def take(self) -> Progress | None:
        """What is new since the last time."""
        latest, self._latest = self._latest, None
        return latest
