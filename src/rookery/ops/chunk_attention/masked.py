"""Top-k chunk attention as a masked dense one, some queries at a time: for training and long prompts."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from rookery.ops.chunk_attention.choice import liked_chunks

SCORES = 1 << 24
"""Scores held at a time."""


def chunk_attention(
    *,
    q: Float[Tensor, "r t h n"],
    past_k: Float[Tensor, "r p h n"],
    past_v: Float[Tensor, "r p h n"],
    means: Float[Tensor, "r c h n"],
    k: Float[Tensor, "r s h n"],
    v: Float[Tensor, "r s h n"],
    base: Int[Tensor, " r"],
    positions: Int[Tensor, "r t"],
    chunk_size: int,
    topk: int,
) -> Float[Tensor, "r t h n"]:
    if not q.numel():
        return torch.zeros_like(q)
    keys = torch.cat([past_k, k], dim=1).transpose(1, 2)  # [r, h, p + s, n]
    values = torch.cat([past_v, v], dim=1).transpose(1, 2)
    number = _numbers(past_k.shape[1], k.shape[1], base)
    at_once = max(1, SCORES // (q.shape[0] * q.shape[2] * number.shape[1]))
    outputs = []
    for some, where in zip(q.split(at_once, dim=1), positions.split(at_once, dim=1), strict=True):
        # padding sees the first later entry, because a softmax over nothing is NaN
        last = where.maximum(base[:, None])
        visible = _visible(some, means, number, last, chunk_size, topk)
        outputs.append(scaled_dot_product_attention(some.transpose(1, 2), keys, values, attn_mask=visible))
    y = torch.cat(outputs, dim=2).transpose(1, 2)
    return y.masked_fill((positions < 0)[..., None, None], 0)


def _numbers(past: int, later: int, base: Tensor) -> Tensor:
    """The entry number of each key, [r, past + later]; past the end, larger than any, where a row has none."""
    old = torch.arange(past, device=base.device)
    none = torch.iinfo(torch.int64).max
    return torch.cat(
        [
            torch.where(old < base[:, None], old, none),
            base[:, None] + torch.arange(later, device=base.device),
        ],
        dim=1,
    )


def _visible(q: Tensor, means: Tensor, number: Tensor, last: Tensor, chunk_size: int, topk: int) -> Tensor:
    """bool [r, 1 or h, t, p + s]: what the queries with the entry numbers `last` [r, t] see."""
    before = (number[:, None] <= last[..., None])[:, None]
    chunk, own = number // chunk_size, last // chunk_size
    if means.shape[1] < topk:  # no query has a chunk to leave out
        return before
    in_own = (chunk[:, None] == own[..., None])[:, None]
    if topk == 1:
        return before & in_own
    best, there = liked_chunks(q, means, own, topk - 1)
    chosen = torch.zeros(*best.shape[:3], means.shape[1], dtype=torch.bool, device=q.device)
    chosen = chosen.scatter(-1, best, there)
    # the own chunk of the last query may have no mean yet; it is never looked up there
    index = chunk.clamp(max=means.shape[1] - 1)[:, None, None].expand(*best.shape[:3], -1)
    return before & (in_own | (chosen.gather(-1, index) & (chunk[:, None] < own[..., None])[:, None]))
