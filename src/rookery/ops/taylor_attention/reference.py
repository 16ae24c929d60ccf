"""Taylor attention, one token at a time. This file is the definition; every other backend must agree with it."""

# b batch, t time, h heads, k key channels, v value channels, f features, d documents

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rookery.ops.taylor_attention.features import features
from rookery.ops.wkv7.reference import per_document


def taylor_attention(
    *,
    q: Float[Tensor, "b t h k"],
    k: Float[Tensor, "b t h k"],
    v: Float[Tensor, "b t h v"],
    state: Float[Tensor, "rows h v+1 f"],
    cu_seqlens: Int[Tensor, " d+1"] | None = None,
) -> tuple[Float[Tensor, "b t h v"], Float[Tensor, "rows h v+1 f"]]:
    if cu_seqlens is not None:
        return per_document(taylor_attention, q=q, k=k, v=v, state=state, cu_seqlens=cu_seqlens)
    out_dtype = v.dtype
    q, k, v = (x.to(state.dtype) for x in (q, k, v))
    outputs = []
    for qt, kt, vt in zip(q.unbind(1), k.unbind(1), v.unbind(1)):
        counted = torch.cat([vt, torch.ones_like(vt[..., :1])], dim=-1)  # [b, h, v + 1]
        state = state + counted[..., None] * features(kt)[..., None, :]
        read = (state @ features(qt)[..., None])[..., 0]
        # the denominator is a sum of numbers that are ½ at least: nothing has to keep it from 0
        outputs.append(read[..., :-1] / read[..., -1:])
    y = torch.stack(outputs, dim=1) if outputs else v.new_zeros(v.shape)
    return y.to(out_dtype), state
