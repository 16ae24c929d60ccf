"""Keeps states by the tokens that led to them, so that no prefix is read twice.

A snapshot of a recurrent model has one size whatever it has read, so a prefix of any length costs the same few
megabytes. Snapshots hang in a trie over token ids; the least recently used ones go first, to the disk if there is a
folder for them.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from rookery.engine.half_state import HALVES, HalfState, check_dtype, halved
from rookery.engine.position import Position, read_position, write_position
from rookery.engine.session import Session
from rookery.errors import BadState

if TYPE_CHECKING:
    from rookery.engine.llm import LLM
    from rookery.engine.runners.protocol import Runner

log = logging.getLogger("rookery")

EVERY = 512
"""A long prompt leaves a snapshot after so many tokens each time."""
SUFFIX = ".state"
PREFIX = "prefix"
"""What the tokens of a snapshot's prefix are called in its file."""


class Hit(NamedTuple):
    """What the cache knows of a prompt."""

    length: int
    """Tokens of the prompt that need not be read; 0 where nothing is known."""
    position: Position | None
    """Where a session stands after them; the caller's own copy."""
    shared: int
    """Tokens that the prompt has in common with some text of the cache: a good place for a snapshot."""


class _Node:
    """A prefix: the label leads to it from its parent."""

    def __init__(self, label: np.ndarray, parent: _Node | None) -> None:
        self.label, self.parent = label, parent
        self.children: dict[int, _Node] = {}
        self.kept: Position | None = None
        self.file: Path | None = None

    @property
    def useless(self) -> bool:
        return self.kept is None and self.file is None and not self.children

    def prefix(self) -> np.ndarray:
        parts, node = [], self
        while node is not None:
            parts.append(node.label)
            node = node.parent
        return np.concatenate(parts[::-1])


class StateCache:
    """Prefix of tokens -> where a session stands after it. May be used by several threads, for one model.

    `budget` bounds the bytes of snapshots in memory. With `folder` those that do not fit go there, one file each, up to
    `disk_budget` bytes; files of an earlier run are found again. A file that is damaged is removed and counts as
    forgotten; files of other models are left alone. `close` writes what is only in memory.

    With `dtype` "bfloat16" or "float16" states are rounded to that and take half the bytes, in memory and on disk. A
    text that goes on from one may then differ from the text without a cache; in float32 nothing does, and files of
    rounded states are left alone.
    """

    def __init__(
        self,
        budget: int = 256 << 20,
        folder: str | os.PathLike[str] | None = None,
        disk_budget: int = 16 << 30,
        dtype: str = "float32",
    ) -> None:
        if budget < 0 or disk_budget < 0:
            raise ValueError(f"budgets are bytes, 0 or more, got {budget} and {disk_budget}")
        check_dtype(dtype)
        self.budget, self.disk_budget, self.dtype = budget, disk_budget, dtype
        self.folder = None if folder is None else Path(folder)
        self.nbytes = 0
        """Bytes of the snapshots in memory."""
        self.disk_nbytes = 0
        """Bytes of the files."""
        self._root = _Node(np.empty(0, np.int32), None)
        self._used: OrderedDict[_Node, int] = OrderedDict()  # in memory, the least recently used first -> bytes
        self._files: OrderedDict[_Node, int] = OrderedDict()
        self._lock = threading.RLock()
        self._runner: Runner | None = None

    def __len__(self) -> int:
        return len({*self._used, *self._files})

    def __bool__(self) -> bool:
        return True  # an empty cache is a cache: `cache or other` must not replace it

    def bind(self, runner: Runner) -> None:
        """Makes it the cache of this model; BadState if it is another's already."""
        with self._lock:
            if self._runner is runner:
                return
            if self._runner is not None and self._runner.fingerprint() != runner.fingerprint():
                raise BadState("this cache holds the states of another model; give each model a cache of its own")
            first, self._runner = self._runner is None, runner
            if first and self.folder is not None:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._scan()

    def find(self, tokens: Sequence[int]) -> Hit:
        """The longest prefix of `tokens` that a snapshot is kept of."""
        wanted = np.asarray(tokens, np.int32)
        with self._lock:
            path, shared = self._walk(wanted)
            for node, length in reversed(path):
                if node.kept is None and node.file is not None:
                    self._read_file(node)
                if node.kept is not None:
                    self._used.move_to_end(node)
                    return Hit(length, self._opened(node.kept), shared)
            return Hit(0, None, shared)

    def keep(self, tokens: Sequence[int], position: Position) -> None:
        """Remembers where a session stands that has read exactly `tokens`, from the beginning of a text."""
        if position.unread or position.state.tokens_seen != len(tokens):
            raise ValueError(
                f"the state has read {position.state.tokens_seen} tokens ({len(position.unread)} are unread), the "
                f"prefix has {len(tokens)}"
            )
        if not tokens:
            return
        with self._lock:
            node = self._insert(np.asarray(tokens, np.int32))
            if node.kept is None:
                self._hold(node, self._packed(position))
            self._used.move_to_end(node)
            self._shrink()

    def clear(self) -> None:
        """Forgets everything in memory and removes the files."""
        with self._lock:
            for node in list(self._files):
                self._forget_file(node)
            self._root, self.nbytes = _Node(np.empty(0, np.int32), None), 0
            self._used.clear()

    def close(self) -> None:
        """Writes what is only in memory to the folder, if there is one."""
        with self._lock:
            if self.folder is not None:
                for node in list(self._used):
                    self._write_file(node)

    def prefixes(self) -> Iterator[tuple[int, ...]]:
        """The prefixes that a snapshot is kept of, in no order."""
        with self._lock:
            nodes = {*self._used, *self._files}
        return (tuple(node.prefix().tolist()) for node in nodes)

    def _walk(self, wanted: np.ndarray) -> tuple[list[tuple[_Node, int]], int]:
        """The nodes on the way along `wanted` with the lengths of their prefixes, and the length that is known."""
        node, at, path = self._root, 0, []
        while at < len(wanted) and (child := node.children.get(int(wanted[at]))) is not None:
            same = common(child.label, wanted[at:])
            at += same
            if same < len(child.label):
                break
            node = child
            path.append((node, at))
        return path, at

    def _insert(self, tokens: np.ndarray) -> _Node:
        path, shared = self._walk(tokens)
        node, at = path[-1] if path else (self._root, 0)
        if shared > at:  # an edge is left in its middle: it gets a node there
            lower = node.children[int(tokens[at])]
            middle = _Node(lower.label[: shared - at].copy(), node)
            node.children[int(tokens[at])] = middle
            lower.label, lower.parent = lower.label[shared - at :].copy(), middle
            middle.children[int(lower.label[0])] = lower
            node, at = middle, shared
        if at < len(tokens):
            leaf = _Node(tokens[at:].copy(), node)
            node.children[int(tokens[at])] = leaf
            node = leaf
        return node

    def _hold(self, node: _Node, position: Position) -> None:
        node.kept = position
        size = position.state.nbytes + node.label.nbytes + (0 if position.logits is None else position.logits.nbytes)
        self._used[node] = size
        self.nbytes += size

    def _packed(self, position: Position) -> Position:
        """What is kept of a place: a copy, in the cache's type."""
        if self.dtype == "float32":
            return position.copy()
        return replace(position, state=halved(position.state, self.dtype))

    def _opened(self, kept: Position) -> Position:
        """A place to go on from; the caller's own copy."""
        if not isinstance(kept.state, HalfState):
            return kept.copy()
        return replace(kept, state=self._runner.init_state(kept.state.tensors()))

    def _shrink(self) -> None:
        while self.nbytes > self.budget and self._used:
            node = next(iter(self._used))
            if self.folder is not None:
                self._write_file(node)
            self.nbytes -= self._used.pop(node)
            node.kept = None
            self._prune(node)

    def _prune(self, node: _Node) -> None:
        """Removes what leads nowhere any more."""
        while node.parent is not None and node.useless:
            parent = node.parent
            del parent.children[int(node.label[0])]
            node = parent
        if node.parent is not None and node.kept is None and node.file is None and len(node.children) == 1:
            (child,) = node.children.values()  # a bend in the way is none: one edge instead of two
            child.label, child.parent = np.concatenate([node.label, child.label]), node.parent
            node.parent.children[int(child.label[0])] = child

    def _write_file(self, node: _Node) -> None:
        if node.file is not None or self._runner is None or self.folder is None:
            return
        prefix = node.prefix()
        kind = "" if self.dtype == "float32" else f".{self.dtype}"
        file = self.folder / f"{hashlib.sha256(prefix.tobytes()).hexdigest()[:32]}{kind}{SUFFIX}"
        try:
            write_position(file, node.kept, self._runner, {PREFIX: prefix})
        except OSError as full:  # a text must not fail because a snapshot could not be kept
            log.warning("a state is not kept: %s", full)
            return
        self._add_file(node, file)

    def _add_file(self, node: _Node, file: Path) -> None:
        node.file, self._files[node] = file, file.stat().st_size
        self.disk_nbytes += self._files[node]
        while self.disk_nbytes > self.disk_budget and self._files:
            self._forget_file(next(iter(self._files)))

    def _forget_file(self, node: _Node) -> None:
        self.disk_nbytes -= self._files.pop(node)
        node.file.unlink(missing_ok=True)
        node.file = None
        self._prune(node)

    def _read_file(self, node: _Node) -> None:
        """Brings a snapshot back to memory; a file that is damaged is removed."""
        try:
            position, extra = read_position(node.file, self._runner)
            if not np.array_equal(extra[PREFIX], node.prefix()):
                raise BadState(f"{str(node.file)!r} holds the state of another prefix")
        except (BadState, KeyError, OSError) as damage:
            log.warning("a kept state is lost and its prefix will be read again: %s", damage)
            self._forget_file(node)
            return
        self._files.move_to_end(node)
        self._hold(node, self._packed(position))
        self._shrink_others(node)

    def _shrink_others(self, node: _Node) -> None:
        # what was just asked for stays, even where it alone is larger than the budget, until the next is kept
        budget, self.budget = self.budget, max(self.budget, self._used[node])
        self._used.move_to_end(node)
        self._shrink()
        self.budget = budget

    def _scan(self) -> None:
        """Finds the files of an earlier run, the oldest first."""
        from safetensors import SafetensorError, safe_open

        model = self._runner.fingerprint()
        for file in sorted(self.folder.glob(f"*{SUFFIX}"), key=lambda file: file.stat().st_mtime):
            if self.dtype == "float32" and file.stem.endswith(tuple(f".{half}" for half in HALVES)):
                continue  # an exact cache knows nothing that was rounded
            try:
                with safe_open(file, framework="numpy") as opened:
                    if (opened.metadata() or {}).get("model") == model:
                        prefix = opened.get_tensor(f"session.{PREFIX}")
                    else:
                        continue
            except SafetensorError as damage:
                log.warning("%s is no state file and is left alone: %s", file, damage)
                continue
            node = self._insert(prefix.astype(np.int32))
            if node.file is None:  # else the same place in another type
                self._add_file(node, file)


def common(a: Sequence[int] | np.ndarray, b: Sequence[int] | np.ndarray) -> int:
    """How many tokens two texts have in common at their beginning."""
    length = min(len(a), len(b))
    apart = np.asarray(a[:length]) != np.asarray(b[:length])
    return int(apart.argmax()) if apart.any() else length


def cuts_of(tokens: Sequence[int], hit: Hit) -> list[int]:
    """Where reading the rest of a prompt pauses for a snapshot, rising; the end is the last."""
    places = {*range(EVERY, len(tokens), EVERY), hit.shared, len(tokens)}
    return sorted(place for place in places if place > hit.length)


def read_prompt(llm: LLM, tokens: Sequence[int], cache: StateCache) -> Session:
    """A session that has read `tokens`, as little of it anew as the cache allows."""
    cache.bind(llm.runner)
    hit = cache.find(tokens)
    session = Session(llm, hit.position)
    done = hit.length
    for cut in cuts_of(tokens, hit):
        session.feed(tokens[done:cut])
        cache.keep(tokens[:cut], session._at)
        done = cut
    return session
