"""Kept states by id: immutable places in a tree of texts, within a budget of bytes and with an expiry.

Going on from a state never changes it, so it can be forked any number of times; to rewind is to take an ancestor.
With a folder each state is a file there before its id is told: it outlives the process, and servers that share the
folder share the conversations. Nothing else is ever handed over between them.
"""

import contextlib
import json
import logging
import os
import re
import secrets
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rookery.engine.llm import LLM
from rookery.engine.position import read_position
from rookery.engine.session import Session
from rookery.engine.state_cache import SUFFIX
from rookery.errors import BadState
from rookery.serve.keys import CALLER
from rookery.serve.schema import ApiError

log = logging.getLogger("rookery")

ID = re.compile(r"(state|resp)_[0-9a-z]{8,64}")
"""What an id may look like before it becomes a file's name."""
ABOUT = "about"
"""What the description of a state is called in its file."""
SWEEP = 60.0
"""Seconds between two looks for files that have expired, at least."""


@dataclass
class Kept:
    """One state."""

    id: str
    session: Session
    parent: str | None
    text: str
    """What was read or written since the parent, to show a tree of texts; the last 2000 characters."""
    created: float = field(default_factory=time.time)
    owner: str | None = field(default_factory=CALLER.get)
    """Whose key it was made with: who has an id may go on from it, but lists show everybody their own."""
    used: float = field(default_factory=time.monotonic)

    @property
    def tokens_seen(self) -> int:
        """Tokens of its text. The last one may be unread: it is read where somebody goes on, in the queue."""
        at = self.session._at
        return at.state.tokens_seen + len(at.unread)

    def about(self, expiry: float) -> dict[str, Any]:
        """What clients are told."""
        left = expiry - (time.monotonic() - self.used)
        return {
            "id": self.id,
            "object": "state",
            "parent": self.parent,
            "tokens_seen": self.tokens_seen,
            "bytes": self.session.nbytes,
            "text": self.text,
            "created": int(self.created),
            "expires_in": max(0, round(left)),
        }


class StateStore:
    """The kept states of one model. The least recently used ones go when the budget is full.

    With `folder`, memory only saves reading: what leaves it stays on the disk until it expires or, the least recently
    used first, `disk_budget` is full. `place` goes into new ids, for whoever must find the process that made one.
    """

    def __init__(
        self,
        llm: LLM,
        budget: int,
        expiry: float,
        *,
        folder: str | os.PathLike[str] | None = None,
        disk_budget: int = 16 << 30,
        place: str = "",
    ) -> None:
        self.llm, self.budget, self.expiry, self.disk_budget, self.place = llm, budget, expiry, disk_budget, place
        self.folder = None if folder is None else Path(folder)
        self._kept: OrderedDict[str, Kept] = OrderedDict()
        self._lock = threading.Lock()
        self._swept = -float("inf")

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def nbytes(self) -> int:
        """Bytes of the kept states in memory."""
        with self._lock:
            return sum(kept.session.nbytes for kept in self._kept.values())

    def keep(self, session: Session, parent: str | None, text: str, id: str | None = None) -> Kept:
        """Keeps where `session` stands under a new id; the session itself may go on. May write a file."""
        kept = Kept(id or new_id("state_", self.place), session.fork(), parent, text[-2000:])
        if self.folder is not None:
            self._write(kept)
        elif kept.session.nbytes > self.budget:
            raise ApiError(
                507, f"a state takes {kept.session.nbytes} bytes, the server keeps {self.budget} in all", code="budget"
            )
        with self._lock:
            self._kept[kept.id] = kept
            self._shrink()
        return kept

    def get(self, id: str) -> Kept:
        """The state of that id; ApiError 404 where it never was, was forgotten or has expired. May read a file."""
        with self._lock:
            self._shrink()
            kept = self._kept.get(id)
        if self.folder is not None:
            kept = self._touched(id, kept)
        if kept is None:
            raise ApiError(
                404, f"no state {id[:80]!r} is kept; it may have expired or made room for others", code="no_state"
            )
        with self._lock:
            kept.used = time.monotonic()
            self._kept[id] = kept
            self._kept.move_to_end(id)
        return kept

    def ancestor(self, id: str, tokens_seen: int) -> Kept:
        """The nearest ancestor, or the state itself, that has read at most so many tokens."""
        kept = self.get(id)
        while kept.tokens_seen > tokens_seen:
            if kept.parent is None:
                raise ApiError(404, f"no kept state before {id!r} has read {tokens_seen} tokens or fewer")
            kept = self.get(kept.parent)
        return kept

    def remove(self, id: str) -> None:
        """Forgets a state; those that came from it stay."""
        self.get(id)
        with self._lock:
            self._kept.pop(id, None)
        if self.folder is not None:
            self._file(id).unlink(missing_ok=True)

    def all(self) -> list[Kept]:
        """Every kept state in memory that the caller made, the oldest first."""
        with self._lock:
            self._shrink()
            own = (kept for kept in self._kept.values() if kept.owner == CALLER.get())
            return sorted(own, key=lambda kept: kept.created)

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

    # the folder

    def _file(self, id: str) -> Path:
        # one folder for a million files would be slow to list and on some file systems to open
        return self.folder / id[-2:] / f"{id}{SUFFIX}"

    def _write(self, kept: Kept) -> None:
        """The state as a session file; ApiError 507 where the disk takes no more, so that no id is told in vain."""
        about = {"parent": kept.parent, "text": kept.text, "created": kept.created, "owner": kept.owner}
        file = self._file(kept.id)
        if time.monotonic() - self._swept > max(SWEEP, self.expiry / 100):
            self._swept = time.monotonic()
            threading.Thread(target=self.sweep, daemon=True).start()  # a million files take a while, nobody waits
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            kept.session.save(file, {ABOUT: np.frombuffer(json.dumps(about).encode(), np.uint8)})
        except OSError as full:
            log.error("a state could not be written: %s", full)
            raise ApiError(507, "the state could not be kept; the server's log says why", code="budget") from None

    def _touched(self, id: str, kept: Kept | None) -> Kept | None:
        """The state, if its file is still there: the folder says what is kept, whoever forgot it. Counts as a use."""
        if not ID.fullmatch(id):
            return None
        file = self._file(id)
        try:
            if time.time() - file.stat().st_mtime > self.expiry:
                file.unlink(missing_ok=True)
                raise FileNotFoundError(file)
            os.utime(file)
            if kept is None:
                at, extra = read_position(file, self.llm.runner)
                kept = Kept(id, Session(self.llm, at), **json.loads(extra[ABOUT].tobytes()))
        except FileNotFoundError:
            with self._lock:
                self._kept.pop(id, None)
            return None
        except (BadState, KeyError, TypeError, ValueError, OSError) as damage:
            # that of another model under the same name, or a disk that fails: left for a person to look at
            log.error("a kept state cannot be read: %s", damage)
            return None
        return kept

    def sweep(self) -> None:
        """Removes files that have expired or, the least recently used first, are too many."""
        found = []
        for file in self.folder.glob("??/*"):  # also what a killed server has left half written
            with contextlib.suppress(FileNotFoundError):  # another server sweeps, too
                about = file.stat()
                found.append((about.st_mtime, about.st_size, file))
        found.sort(reverse=True)
        size, oldest = 0, time.time() - self.expiry
        for used, bytes_, file in found:
            size += bytes_
            if used < oldest or size > self.disk_budget:
                file.unlink(missing_ok=True)


def new_id(kind: str, place: str) -> str:
    """An id that cannot be guessed: `kind`, the place that made it, 24 hexadecimal digits."""
    return f"{kind}{place}{secrets.token_hex(12)}"
