"""Kept states by id: immutable places in a tree of texts, within a budget of bytes and with an expiry.

Going on from a state never changes it, so it can be forked any number of times; to rewind is to take an ancestor.
"""

import secrets
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rookery.engine.llm import LLM
from rookery.engine.session import Session
from rookery.errors import BadState
from rookery.serve.schema import ApiError


@dataclass
class Kept:
    """One state."""

    id: str
    session: Session
    parent: str | None
    text: str
    """What was read or written since the parent, to show a tree of texts; the last 2000 characters."""
    created: float = field(default_factory=time.time)
    used: float = field(default_factory=time.monotonic)

    def about(self, expiry: float) -> dict[str, Any]:
        """What clients are told."""
        left = expiry - (time.monotonic() - self.used)
        return {
            "id": self.id,
            "object": "state",
            "parent": self.parent,
            "tokens_seen": self.session.tokens_seen,
            "bytes": self.session.nbytes,
            "text": self.text,
            "created": int(self.created),
            "expires_in": max(0, round(left)),
        }


class StateStore:
    """The kept states of one model. The least recently used ones go when the budget is full."""

    def __init__(self, llm: LLM, budget: int, expiry: float) -> None:
        self.llm, self.budget, self.expiry = llm, budget, expiry
        self._kept: OrderedDict[str, Kept] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def nbytes(self) -> int:
        """Bytes of all kept states."""
        with self._lock:
            return sum(kept.session.nbytes for kept in self._kept.values())

    def keep(self, session: Session, parent: str | None, text: str, id: str | None = None) -> Kept:
        """Keeps where `session` stands under a new id; the session itself may go on."""
        kept = Kept(id or f"state_{secrets.token_hex(12)}", session.fork(), parent, text[-2000:])
        if kept.session.nbytes > self.budget:
            raise ApiError(
                507, f"a state takes {kept.session.nbytes} bytes, the server keeps {self.budget} in all", code="budget"
            )
        with self._lock:
            self._kept[kept.id] = kept
            self._shrink()
        return kept

    def get(self, id: str) -> Kept:
        """The state of that id; ApiError 404 where it never was, was forgotten or has expired."""
        with self._lock:
            self._shrink()
            kept = self._kept.get(id)
            if kept is None:
                raise ApiError(
                    404, f"no state {id[:80]!r} is kept; it may have expired or made room for others", code="no_state"
                )
            kept.used = time.monotonic()
            self._kept.move_to_end(id)
            return kept

    def ancestor(self, id: str, tokens_seen: int) -> Kept:
        """The nearest ancestor, or the state itself, that has read at most so many tokens."""
        kept = self.get(id)
        while kept.session.tokens_seen > tokens_seen:
            if kept.parent is None:
                raise ApiError(404, f"no kept state before {id!r} has read {tokens_seen} tokens or fewer")
            kept = self.get(kept.parent)
        return kept

    def remove(self, id: str) -> None:
        """Forgets a state; those that came from it stay."""
        self.get(id)
        with self._lock:
            self._kept.pop(id, None)

    def all(self) -> list[Kept]:
        """Every kept state, the oldest first."""
        with self._lock:
            self._shrink()
            return sorted(self._kept.values(), key=lambda kept: kept.created)

    def export(self, id: str, folder: Path) -> Path:
        """Writes the state as a session file, which `rookery chat --state` reads too, and gives its path."""
        path = folder / f"{secrets.token_hex(8)}.state"
        self.get(id).session.fork().save(path)
        return path

    def load(self, path: Path) -> Kept:
        """Keeps the state in a session file; ApiError 400 for a damaged one or that of another model."""
        try:
            session = self.llm.session(path)
        except (BadState, ValueError, OSError) as wrong:
            raise ApiError(400, str(wrong).replace(str(path), "the file"), code="bad_state") from None
        return self.keep(session, None, "")

    def _shrink(self) -> None:
        """Forgets what has expired and, the least recently used first, what the budget has no room for."""
        now = time.monotonic()
        for id in [id for id, kept in self._kept.items() if now - kept.used > self.expiry]:
            del self._kept[id]
        size = sum(kept.session.nbytes for kept in self._kept.values())
        while size > self.budget:
            _, kept = self._kept.popitem(last=False)
            size -= kept.session.nbytes


def picture(session: Session) -> list[list[float]]:
    """Norm of the recurrent state per layer and head [layers][heads], for whoever wants to see it move.

    Models without matrices per head give one number a layer.
    """
    found: dict[int, list[float]] = {}
    tensors = session._shown().state.tensors()
    for name, array in tensors.items():
        parts = name.split(".")
        if parts[0] != "layers" or parts[2] not in ("wkv", "keys"):
            continue
        values = np.asarray(array, np.float32)[0]
        axes = tuple(range(1, values.ndim)) if values.ndim == 3 else None
        found[int(parts[1])] = np.atleast_1d(np.sqrt(np.square(values).sum(axis=axes))).tolist()
    return [found[layer] for layer in sorted(found)]
