"""WKV-4, one token at a time. This file is the definition; every other backend must agree with it."""

# b batch, t time, c channels, d documents

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rookery.ops.wkv7.reference import per_document


def wkv4(
    *,
    log_w: Float[Tensor, " c"],
    u: Float[Tensor, " c"],
    k: Float[Tensor, "b t c"],
    v: Float[Tensor, "b t c"],
    state: Float[Tensor, "rows 3 c"],
    cu_seqlens: Int[Tensor, " d+1"] | None = None,
) -> tuple[Float[Tensor, "b t c"], Float[Tensor, "rows 3 c"]]:
    if cu_seqlens is not None:
        run = lambda **rows: wkv4(log_w=log_w, u=u, **rows)  # noqa: E731
        return per_document(run, k=k, v=v, state=state, cu_seqlens=cu_seqlens)
    out_dtype = v.dtype
    log_w, u, k, v = (x.to(state.dtype) for x in (log_w, u, k, v))
    # sums of e^k v and e^k, both divided by e^top, so that no exponential overflows; `highest` cancels out of all they
    # are used for, so it is a constant to gradients
    weighted, total, top = state[:, 0], state[:, 1], state[:, 2].detach()
    outputs = []
    for kt, vt in zip(k.unbind(1), v.unbind(1)):
        highest = torch.maximum(top, u + kt).detach()
        past, now = (top - highest).exp(), (u + kt - highest).exp()
        outputs.append((past * weighted + now * vt) / (past * total + now))
        highest = torch.maximum(top + log_w, kt).detach()
        past, now = (top + log_w - highest).exp(), (kt - highest).exp()
        weighted, total, top = past * weighted + now * vt, past * total + now, highest
    y = torch.stack(outputs, dim=1) if outputs else v.new_zeros(v.shape)
    return y.to(out_dtype), torch.stack([weighted, total, top], dim=1)
