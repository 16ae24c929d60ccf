"""The recurrence of RWKV-5 (arXiv 2404.05892, eq. 17-18): that of RWKV-6 with a decay that no token changes.

RWKV-5.0 and 5.1 have one decay and bonus per head, RWKV-5.2 one per channel; the former are the latter with equal
channels.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rookery.ops.dispatch import Backend, Op
from rookery.ops.wkv6 import chunked, native, reference, triton


def _expanded(run: Callable) -> Callable:
    """A backend of wkv6 that takes one decay for all tokens."""
    return lambda *, log_w, r, **call: run(log_w=log_w.expand_as(r), r=r, **call)


OP = Op(
    "wkv5",
    [
        Backend("native", native.wkv6, native.why_not),
        Backend("triton", _expanded(triton.wkv6), triton.why_not),
        Backend("chunked", _expanded(chunked.wkv6)),
        Backend("reference", _expanded(reference.wkv6)),
    ],
)


def wkv5(
    *,
    r: Float[Tensor, "b t h k"],
    log_w: Float[Tensor, "h k"],
    k: Float[Tensor, "b t h k"],
    v: Float[Tensor, "b t h v"],
    u: Float[Tensor, "h k"],
    state: Float[Tensor, "rows h v k"] | None = None,
    cu_seqlens: Int[Tensor, " d+1"] | None = None,
    backend: str | None = None,
) -> tuple[Float[Tensor, "b t h v"], Float[Tensor, "rows h v k"]]:
    """As `rookery.ops.wkv6`, with `log_w` and `u` per head and channel."""
    rows = r.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    expected = (rows, r.shape[2], v.shape[3], r.shape[3])
    if state is None:
        state = r.new_zeros(expected, dtype=torch.promote_types(r.dtype, torch.float32))
    if state.shape != expected:
        raise ValueError(f"state is {list(state.shape)}, expected [rows, head, value, key] = {list(expected)}")
    return OP(backend=backend, r=r, log_w=log_w, k=k, v=v, u=u, state=state, cu_seqlens=cu_seqlens)
