"""Bi-WKV6 as two runs of wkv6, in whatever backend that has here."""

import torch
from torch import Tensor

from rookery.ops.wkv6 import wkv6


def bi_wkv6(*, r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, u: Tensor) -> Tensor:
    """As `rookery.ops.bi_wkv6.bi_wkv6`; each direction's outputs are rounded to the dtype of `v`, then their sum."""
    if not r.shape[1]:
        return v.clone()
    forwards, _ = wkv6(r=r, log_w=log_w, k=k, v=v, u=u)
    r, log_w, k, v = (x.flip(1) for x in (r, log_w, k, v))
    backwards, _ = wkv6(r=r, log_w=log_w, k=k, v=v, u=torch.zeros_like(u))
    return forwards + backwards.flip(1)
