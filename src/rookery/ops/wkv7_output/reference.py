"""What RWKV-7 does to the recurrence's output. This file is the definition."""

# b batch, t time, h heads, n channels of a head, c = h · n

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import group_norm


def wkv7_output(
    *,
    y: Float[Tensor, "b t h n"],
    r: Float[Tensor, "b t h n"],
    k: Float[Tensor, "b t h n"],
    v: Float[Tensor, "b t h n"],
    gate: Float[Tensor, "b t c"],
    r_k: Float[Tensor, "h n"],
    weight: Float[Tensor, " c"],
    bias: Float[Tensor, " c"],
    eps: float,
) -> Float[Tensor, "b t c"]:
    dtype, wide = gate.dtype, torch.promote_types(gate.dtype, torch.float32)
    y, r, k, v, gate, r_k, weight, bias = (x.to(wide) for x in (y, r, k, v, gate, r_k, weight, bias))
    normed = group_norm(y.flatten(0, 1).flatten(1), y.shape[2], weight, bias, eps).view(gate.shape)
    bonus = (r * k * r_k).sum(dim=-1, keepdim=True) * v
    return ((normed + bonus.flatten(2)) * gate).to(dtype)
