"""WKV-6, one token at a time. This file is the definition; every other backend must agree with it."""

# b batch, t time, h heads, k key channels, v value channels, d documents

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rookery.ops.wkv7.reference import per_document


def wkv6(
    *,
    r: Float[Tensor, "b t h k"],
    log_w: Float[Tensor, "b t h k"],
    k: Float[Tensor, "b t h k"],
    v: Float[Tensor, "b t h v"],
    u: Float[Tensor, "h k"],
    state: Float[Tensor, "rows h v k"],
    cu_seqlens: Int[Tensor, " d+1"] | None = None,
) -> tuple[Float[Tensor, "b t h v"], Float[Tensor, "rows h v k"]]:
    if cu_seqlens is not None:
        run = lambda **rows: wkv6(u=u, **rows)  # noqa: E731
        return per_document(run, r=r, log_w=log_w, k=k, v=v, state=state, cu_seqlens=cu_seqlens)
    out_dtype = v.dtype
    r, log_w, k, v, u = (x.to(state.dtype) for x in (r, log_w, k, v, u))
    outputs = []
    for rt, wt, kt, vt in zip(r.unbind(1), log_w.exp().unbind(1), k.unbind(1), v.unbind(1)):
        written = vt[..., None] * kt[..., None, :]
        # the token itself is read with the bonus u instead of a place in the state
        outputs.append(((state + u[:, None, :] * written) @ rt[..., None])[..., 0])
        state = state * wt[..., None, :] + written
    y = torch.stack(outputs, dim=1) if outputs else v.new_zeros(v.shape)
    return y.to(out_dtype), state
