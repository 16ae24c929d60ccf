"""Histories that grow by one entry a token: where the new entries of a call go, row by row.

Entry j of a row belongs to its position j; what lies beyond a row's length is never read. So masks, packed documents
and any cut into calls give the same numbers.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from rookery.nn.packing import row_mask, unpack

# r rows, t new tokens (of the longest row), p positions so far and new


class Growth(NamedTuple):
    """How one call lengthens the histories of its rows."""

    start: Tensor
    """int64 [r], entries before the call"""
    positions: Tensor
    """int64 [r, t], −1 at padding"""
    length: int
    """entries after the call, of the longest row"""
    appends: bool
    """true if every row's history simply grows by t entries"""
    real: Tensor | None
    """bool [r, t], tokens among padding; None where all are"""

    def rows(self, x: Tensor) -> Tensor:
        """New values [r, t, ...], one row per document, from the call's layout [b, t, ...]."""
        return x if self.real is None else unpack(x, self.real)

    def packed(self, x: Tensor) -> Tensor:
        """Values [r, t, ...] in the call's layout."""
        return x if self.real is None else x[self.real][None]

    def write(self, history: Tensor, new: Tensor) -> Tensor:
        """`history` [r, p, ...] with `new` [r, t, ...] at its places; padding is left out."""
        if self.appends:
            return torch.cat([history, new], dim=1)
        behind = (0, 0) * (history.dim() - 2)
        # one entry more takes the padding and is cut off again
        grown = pad(history, (*behind, 0, self.length + 1 - history.shape[1]))
        index = self.positions.where(self.positions >= 0, self.length)
        index = index.view(*index.shape, *[1] * (new.dim() - 2)).expand_as(new)
        return grown.scatter(1, index, new)[:, : self.length]


def growth(tokens: Tensor, seen: Tensor, held: int, cu_seqlens: Tensor | None) -> Growth:
    """The growth that `tokens` [b, t] bring to rows that have read `seen` [r], in histories of `held` entries."""
    real = None if cu_seqlens is None else row_mask(cu_seqlens)
    new = tokens.shape[1] if real is None else real.shape[1]
    positions = seen[:, None] + torch.arange(new, device=tokens.device)
    if tokens.numel() == 0:
        return Growth(seen, positions, held, real is None, real)
    appends = real is None and bool((seen == held).all())
    if real is not None:
        positions = positions.where(real, -1)
    length = held + new if appends else max(held, int(positions.max()) + 1)
    return Growth(seen, positions, length, appends, real)
