"""Where a conversation stands: the state, what it would say next, what is not read yet; and the file that keeps it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from rookery.checkpoints.state_file import SESSION_PREFIX, read_state, write_state
from rookery.engine.runners.protocol import RowState, Runner

RECENT = 8
"""Tokens that a decoder needs to go on; a character has at most four bytes, and few tokens have none."""


@dataclass
class Position:
    """Where a session stands."""

    state: RowState
    """What the model remembers; advanced in place."""
    logits: np.ndarray | None = None
    """float32 [vocab], what follows the last token of `state`; None where nothing was read, or its logits are lost."""
    unread: tuple[int, ...] = ()
    """Tokens that belong to the text and are not in `state` yet."""
    recent: tuple[int, ...] = ()
    """The last tokens of the text: enough for a decoder to go on in the middle of a character or a word."""

    def add(self, tokens: Sequence[int]) -> None:
        """Lengthens the text."""
        self.unread += tuple(tokens)
        self.recent = (self.recent + tuple(tokens))[-RECENT:]

    def copy(self) -> Position:
        """An independent copy; logits are never written to and may be shared."""
        return replace(self, state=self.state.copy())


def write_position(
    path: str | os.PathLike[str], at: Position, runner: Runner, extra: Mapping[str, np.ndarray] | None = None
) -> None:
    """Writes a session's file; `extra` are more arrays to keep beside the state. Nothing of `at` may be unread."""
    kept = {"recent": np.array(at.recent, np.int64)} | dict(extra or {})
    if at.logits is not None:
        kept["logits"] = at.logits[None]
    tensors = at.state.tensors() | {SESSION_PREFIX + name: array for name, array in kept.items()}
    write_state(path, tensors, model=runner.fingerprint())


def read_position(path: str | os.PathLike[str], runner: Runner) -> tuple[Position, dict[str, np.ndarray]]:
    """What `write_position` wrote, and the arrays beside it by name; BadState where it is damaged or another's."""
    return position_of(read_state(path, model=runner.fingerprint()), runner)


def position_of(arrays: dict[str, np.ndarray], runner: Runner) -> tuple[Position, dict[str, np.ndarray]]:
    """A session's place from the arrays of its file, and those that are kept beside the state."""
    extra = {n.removeprefix(SESSION_PREFIX): arrays.pop(n) for n in list(arrays) if n.startswith(SESSION_PREFIX)}
    logits, recent = extra.get("logits"), extra.get("recent", np.empty(0, np.int64))
    state = runner.init_state(arrays)
    return Position(state, None if logits is None else logits[0], recent=tuple(recent.tolist())), extra
