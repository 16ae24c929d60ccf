"""Top-k chunk attention, one query and head at a time: the definition."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

# r rows, t queries, h heads, n channels of a head, p entries in complete chunks, s later entries, c chunks


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
    rows = []
    for row, start in enumerate(base.tolist()):
        keys = torch.cat([past_k[row, :start], k[row]])  # entry by entry, [start + s, h, n]
        values = torch.cat([past_v[row, :start], v[row]])
        outputs = []
        for query, position in zip(q[row], positions[row].tolist(), strict=True):
            heads = [
                attend(query[h], keys[:, h], values[:, h], means[row, :, h], position, chunk_size, topk)
                for h in range(q.shape[2])
            ]
            outputs.append(torch.stack(heads))
        rows.append(torch.stack(outputs) if outputs else torch.zeros_like(q[row]))
    return torch.stack(rows)


def attend(
    q: Float[Tensor, " n"],
    keys: Float[Tensor, "e n"],
    values: Float[Tensor, "e n"],
    means: Float[Tensor, "c n"],
    position: int,
    chunk_size: int,
    topk: int,
) -> Float[Tensor, " n"]:
    """What one query of one head, entry number `position`, finds."""
    if position < 0:
        return torch.zeros_like(values[0])
    own = position // chunk_size
    gate = (means[:own] @ q.to(means.dtype)).tolist()
    liked = sorted(range(own), key=lambda chunk: (gate[chunk], chunk), reverse=True)[: topk - 1]
    seen = [entry for chunk in sorted(liked) for entry in range(chunk * chunk_size, (chunk + 1) * chunk_size)]
    seen += range(own * chunk_size, position + 1)
    weights = (keys[seen] @ q / q.shape[0] ** 0.5).softmax(dim=0)
    return weights @ values[seen]
