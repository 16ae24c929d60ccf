"""Sizes of top-k chunk sparse attention and of its cache, and how many entries the cache holds when."""

from dataclasses import dataclass
from typing import Literal

BUDGETS = {
    "unbounded": {"max_entries": 0},
    # the paper's 64K cache; its lower limit is ours
    "paper-64k": {"max_entries": 65536, "min_entries": 61440, "window": 2048},
    # what the published pip package sets
    "pip-default": {"max_entries": 20000, "min_entries": 16000, "window": 2000},
}
"""Published limits of the cache, as fields of a config."""


@dataclass(frozen=True, kw_only=True)
class ChunkedAttention:
    """Fields of a config whose model has chunk attention: part of the model, like its weights, but in no file of them.

    Tokens are appended until the cache holds `max_entries`; at that token, whatever the cut into calls, it is reduced
    to `min_entries`.
    """

    chunk_size: int = 2048
    """Entries of a chunk."""
    topk: int = 3
    """Chunks that a query attends to, its own among them."""
    max_entries: int = 0
    """Entries at which a cache is reduced; 0 for a cache that grows for ever."""
    min_entries: int = 0
    """Entries that remain."""
    window: int = 0
    """Newest entries that remain in any case; more, so that whole chunks stay whole."""
    observed: int = 32
    """Newest queries whose attention votes for what remains of the older entries."""
    eviction: Literal["vote", "newest"] = "vote"
    """Whether votes or age decide."""

    def check_budget(self) -> None:
        """ValueError for sizes that make no cache."""
        if self.chunk_size < 1 or self.topk < 1:
            raise ValueError(f"chunk_size ({self.chunk_size}) and topk ({self.topk}) must be at least 1")
        if self.eviction not in ("vote", "newest"):
            raise ValueError(f"eviction must be vote or newest, got {self.eviction!r}")
        if not self.max_entries:
            return
        if not self.window_entries <= self.min_entries < self.max_entries:
            raise ValueError(
                f"min_entries ({self.min_entries}) must be smaller than max_entries ({self.max_entries}) and hold the "
                f"window, which is {self.window_entries} entries in whole chunks of {self.chunk_size}"
            )
        if not 1 <= self.observed <= self.max_entries:
            raise ValueError(f"observed ({self.observed}) must be 1 to max_entries ({self.max_entries})")

    @property
    def window_entries(self) -> int:
        """Entries of the window when the cache is reduced: it begins where a chunk begins."""
        return self.max_entries - max(0, self.max_entries - self.window) // self.chunk_size * self.chunk_size

    def entries(self, tokens_seen: int) -> int:
        """Entries that a row holds after so many tokens."""
        if not self.max_entries or tokens_seen < self.max_entries:
            return tokens_seen
        return self.min_entries + (tokens_seen - self.max_entries) % (self.max_entries - self.min_entries)

    def places(self, tokens_seen: int) -> tuple[int, int]:
        """Places for entries of complete chunks, and for those of the chunk that is filling.

        Places are given by the most that a row ever held, so that shorter rows find room beside longer ones.
        """
        held = min(tokens_seen, self.max_entries) if self.max_entries else tokens_seen
        return held // self.chunk_size * self.chunk_size, min(held, self.chunk_size - 1)

    def cache_nbytes(self, *, tokens_seen: int, heads: int, dim: int, itemsize: int) -> int:
        """Bytes of one layer's cache of one row: keys and values, mean keys, and what eviction needs."""
        complete, filling = self.places(tokens_seen)
        width = heads * dim
        entries = 2 * (complete + filling) * width * itemsize + complete // self.chunk_size * width * max(4, itemsize)
        if not self.max_entries:
            return entries
        votes = self.observed * width * itemsize if self.eviction == "vote" else 0
        return entries + votes + 8 * (complete + filling) * heads  # the positions of entries, int64
