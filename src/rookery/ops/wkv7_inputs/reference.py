"""What RWKV-7 does to its projections before the recurrence. This file is the definition."""

# b batch, t time, h heads, n channels of a head, c = h · n

import torch
from jaxtyping import Float
from torch import Tensor

LOG_DECAY_SCALE = -0.6065306597126334
"""−e^(−1/2): the log decay lies in (−0.6065, 0)."""
NORM_FLOOR = 1e-12
"""Smallest norm that a key is divided by (core.md 1.11)."""


def wkv7_inputs(
    *,
    k: Float[Tensor, "b t c"],
    decay_logit: Float[Tensor, "b t c"],
    rate_logit: Float[Tensor, "b t c"],
    k_k: Float[Tensor, " c"],
    k_a: Float[Tensor, " c"],
    head_dim: int,
) -> tuple[Float[Tensor, "b t h n"], Float[Tensor, "b t h n"], Float[Tensor, "b t h n"], Float[Tensor, "b t h n"]]:
    dtype, wide = k.dtype, torch.promote_types(k.dtype, torch.float32)
    k, decay_logit, rate_logit, k_k, k_a = (x.to(wide) for x in (k, decay_logit, rate_logit, k_k, k_a))
    heads = (-1, head_dim)
    log_w = LOG_DECAY_SCALE * decay_logit.sigmoid()
    rate = rate_logit.sigmoid()
    removal = (k * k_k).unflatten(-1, heads)
    removal = removal / removal.norm(dim=-1, keepdim=True).clamp(min=NORM_FLOOR)
    k = k * (1 + (rate - 1) * k_a)
    a, b = -removal, removal * rate.unflatten(-1, heads)
    return log_w.unflatten(-1, heads), k.unflatten(-1, heads).to(dtype), a.to(dtype), b.to(dtype)
