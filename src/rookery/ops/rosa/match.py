"""Longest matches of many strings at once, as run lengths along the diagonals of "query i equals key j"."""

# n strings, p symbols so far, t new ones

import torch
from torch import Tensor
from torch.nn.functional import pad


@torch.no_grad()
def match(q: Tensor, k: Tensor, start: Tensor, time: int) -> Tensor:
    """Where ROSA's answer stands, int64 [n, t]: one behind the best match of query start + s, −1 where none matches.

    q, k: symbols [n, p] of any integer type. start: int64 [n], the place of each string's first new query. O(t p) for
    each string, and O(m p) more for a longest match of m at `start`; no p × p table is held.
    """
    strings, length = k.shape
    dtype = torch.int32 if length < 46340 else torch.int64  # length² must fit
    place = torch.arange(length, device=k.device, dtype=dtype)
    runs = _runs_before(q, k, start).to(dtype)
    found = torch.full((strings, time), -1, dtype=torch.int64, device=k.device)
    furthest = int(start.max()) if len(start) else 0
    for s in range(time):
        i = start + s
        seen = min(length, furthest + s)  # no string looks at keys beyond these
        query = q.gather(1, i.clamp(max=max(length - 1, 0))[:, None]) if length else q
        runs = torch.where(k[:, :seen] == query, pad(runs, (1, 0))[:, :seen] + 1, 0)
        if not seen:
            continue
        # longest first, then latest; keys from i on are out of sight
        best = (runs * length + place[:seen]).masked_fill(place[:seen] >= i[:, None], -1).amax(dim=1)
        found[:, s] = torch.where((best >= length) & (i < length), best % length + 1, -1)
    return found


def _runs_before(q: Tensor, k: Tensor, start: Tensor) -> Tensor:
    """int64 [n, up to p]: symbols that the text up to query start − 1 and up to key j have in common at their ends."""
    width = min(k.shape[1], int(start.max())) if len(start) else 0
    place = torch.arange(width, device=k.device)
    runs = torch.zeros(k.shape[0], width, dtype=torch.int64, device=k.device)
    alive = (place < start[:, None]).expand_as(runs)
    for back in range(width):
        i = start - 1 - back
        query = q.gather(1, i.clamp(min=0)[:, None])
        same = pad(k[:, : width - back] == query, (back, 0), value=False)
        alive = alive & same & (i >= 0)[:, None]
        if not alive.any():
            break
        runs += alive
    return runs
