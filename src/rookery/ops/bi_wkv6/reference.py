"""Bi-WKV6 by its definition: all pairs of tokens. Every other backend must agree with it."""

# b batch, t queries, i keys, h heads, k key channels, v value channels

import torch
from jaxtyping import Float
from torch import Tensor


def bi_wkv6(
    *,
    r: Float[Tensor, "b t h k"],
    log_w: Float[Tensor, "b t h k"],
    k: Float[Tensor, "b t h k"],
    v: Float[Tensor, "b t h v"],
    u: Float[Tensor, "h k"],
) -> Float[Tensor, "b t h v"]:
    wide = torch.promote_types(r.dtype, torch.float32)
    r, log_w, k, u = (x.to(wide) for x in (r, log_w, k, u))
    place = torch.arange(r.shape[1], device=r.device)
    outputs = []
    for t in range(r.shape[1]):
        # for every key i, the tokens j between: a sum, because a difference of sums loses the digits of slow decays
        low, high = torch.minimum(place, place[t]), torch.maximum(place, place[t])
        between = (place > low[:, None]) & (place < high[:, None])  # [i, j]
        decays = torch.where(between[..., None, None], log_w[:, None], 0.0).sum(2).exp()  # [b, i, h, k]
        weights = torch.where((place == t)[:, None, None], u, decays)
        weights = torch.einsum("bhk,bihk,bihk->bih", r[:, t], weights, k)
        outputs.append(torch.einsum("bih,bihv->bhv", weights, v.to(wide)))
    return torch.stack(outputs, dim=1).to(v.dtype) if outputs else v.clone()
