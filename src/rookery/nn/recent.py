"""Layers that remember the last tokens only: rows of a call behind what earlier calls kept, and what to keep of them.

What is kept has a fixed size from the first token on, zero where no token has been. So masks, packed documents and any
cut into calls give the same numbers.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from rookery.nn.packing import row_mask, unpack

# r rows, t new tokens (of the longest row), n entries kept


class Recent(NamedTuple):
    """The new tokens of one call, row by row."""

    seen: Tensor
    """int64 [r], tokens before the call"""
    read: Tensor
    """int64 [r], tokens of the call"""
    real: Tensor | None
    """bool [r, t], tokens among padding; None where all are"""

    def rows(self, x: Tensor) -> Tensor:
        """New values [r, t, ...], one row per document, from the call's layout [b, t, ...]."""
        return x if self.real is None else unpack(x, self.real)

    def packed(self, x: Tensor) -> Tensor:
        """Values [r, t, ...] in the call's layout."""
        return x if self.real is None else x[self.real][None]

    def last(self, history: Tensor, count: int) -> Tensor:
        """The last `count` entries of every row of `history` [r, n + t, ...], which ends in the call's tokens."""
        if self.real is None:
            return history[:, history.shape[1] - count :]
        longest = self.real.shape[1]
        first = history.shape[1] - longest - count + self.read
        return _take(history, first[:, None] + torch.arange(count, device=history.device))

    def in_order(self, ring: Tensor) -> Tensor:
        """A ring [r, n, ...], where position p stands at p mod n, with the oldest entry first."""
        return _rolled(ring, self.seen)

    def in_ring(self, ordered: Tensor) -> Tensor:
        """The last n entries [r, n, ...] of every row, the oldest first, each at its place in the ring."""
        return _rolled(ordered, -(self.seen + self.read))


def recent(tokens: Tensor, seen: Tensor, cu_seqlens: Tensor | None) -> Recent:
    """The call of `tokens` [b, t] for rows that have read `seen` [r]."""
    if cu_seqlens is None:
        return Recent(seen, torch.full_like(seen, tokens.shape[1]), None)
    return Recent(seen, cu_seqlens.diff(), row_mask(cu_seqlens))


def _rolled(x: Tensor, by: Tensor) -> Tensor:
    """Every row of x [r, n, ...] turned to begin with its entry `by` [r] mod n."""
    n = x.shape[1]
    return _take(x, (torch.arange(n, device=x.device) + by[:, None]) % n)


def _take(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index.view(*index.shape, *[1] * (x.dim() - 2)).expand(*index.shape, *x.shape[2:]))
