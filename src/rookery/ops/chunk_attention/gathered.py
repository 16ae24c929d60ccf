"""Top-k chunk attention that copies the chosen chunks together: for few queries, as in decoding.

The work per query depends on chunk_size · topk and not on how many entries there are, but for the products with the
mean keys.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rookery.ops.chunk_attention.choice import liked_chunks

MOST_COPIED = 1 << 24
"""Numbers of chosen keys; more are dearer to copy than `masked` is to compute."""


def why_not(*, q: Tensor, k: Tensor, means: Tensor, chunk_size: int, topk: int, **_: object) -> str | None:
    rows, queries, heads, dim = q.shape
    if k.shape[1] > chunk_size:
        return f"the later entries are {k.shape[1]}, more than one chunk of {chunk_size}"
    copied = rows * queries * heads * dim * chunk_size * min(topk - 1, means.shape[1])
    if copied > MOST_COPIED:
        return f"it would copy {copied} numbers of keys, more than {MOST_COPIED}"
    return None


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
    wide = torch.promote_types(q.dtype, torch.float32)
    scale = q.shape[-1] ** -0.5
    # padding sees the first entry, because a softmax over nothing is NaN
    last = (positions - base[:, None]).clamp(min=0)
    hidden = torch.arange(k.shape[1], device=q.device) > last[..., None]
    own = (torch.einsum("rthn,rshn->rhts", q, k).to(wide) * scale).masked_fill(hidden[:, None], -torch.inf)
    count = min(topk - 1, past_k.shape[1] // chunk_size)
    if not count:
        weights = own.softmax(dim=-1).to(v.dtype)
        return _without_padding(torch.einsum("rhts,rshn->rthn", weights, v), positions)
    chunks = (base // chunk_size)[:, None].expand_as(positions)
    best, there = liked_chunks(q, means[:, : past_k.shape[1] // chunk_size], chunks, count)
    chosen_k, chosen_v = (_copied(x, best, chunk_size) for x in (past_k, past_v))  # [r, h, t, k · chunk, n]
    scores = (chosen_k @ q.transpose(1, 2)[..., None])[..., 0].to(wide) * scale
    scores = scores.masked_fill(~there.repeat_interleave(chunk_size, dim=-1), -torch.inf)
    weights = torch.cat([scores, own], dim=-1).softmax(dim=-1).to(v.dtype)
    of_chosen, of_own = weights.split([scores.shape[-1], own.shape[-1]], dim=-1)
    y = (of_chosen[..., None, :] @ chosen_v)[..., 0, :].transpose(1, 2)
    return _without_padding(y + torch.einsum("rhts,rshn->rthn", of_own, v), positions)


def _copied(past: Tensor, best: Tensor, chunk_size: int) -> Tensor:
    """The entries [r, h, t, k · chunk_size, n] of the chunks `best` [r, h, t, k]."""
    rows, heads = past.shape[0], past.shape[2]
    row = torch.arange(rows, device=past.device)[:, None, None, None]
    head = torch.arange(heads, device=past.device)[:, None, None]
    return past.unflatten(1, (-1, chunk_size))[row, best, :, head].flatten(3, 4)


def _without_padding(y: Tensor, positions: Tensor) -> Tensor:
    return y.masked_fill((positions < 0)[..., None, None], 0)
