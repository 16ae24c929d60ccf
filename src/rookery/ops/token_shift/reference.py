"""Token shift with interpolations. This file is the definition; every other backend must agree with it."""

# b batch, t time, c channels, n interpolations, rows batch or documents

import torch
from jaxtyping import Float, Int
from torch import Tensor


def token_shift(
    *,
    x: Float[Tensor, "b t c"],
    mix: Float[Tensor, "n c"],
    previous: Float[Tensor, "rows c"],
    cu_seqlens: Int[Tensor, " d+1"] | None = None,
) -> tuple[Float[Tensor, "n b t c"], Float[Tensor, "rows c"]]:
    if cu_seqlens is None:
        before = torch.cat([previous[:, None], x[:, :-1]], dim=1) if x.shape[1] else x
        last = x[:, -1] if x.shape[1] else previous
    else:
        starts, ends = cu_seqlens[:-1], cu_seqlens[1:]
        read = (ends > starts)[:, None]  # empty documents keep their state
        before = torch.cat([x[:, :1], x[:, :-1]], dim=1)[0].index_put((starts[read[:, 0]],), previous[read[:, 0]])[None]
        last = torch.where(read, x[0, (ends - 1).clamp(min=0)], previous) if x.shape[1] else previous
    return torch.stack([x + (before - x) * m for m in mix]), last
