"""The recurrence of RWKV-4 (arXiv 2305.13048, eq. 16): an average of values whose weights decay, channel by channel.

    y_t = (Σ_{i<t} e^{(t−1−i) log_w + k_i} v_i + e^{u + k_t} v_t) / (the same without v)

The state holds the two sums divided by e^top, and top, the largest exponent so far: [weighted, total, top]. What counts
is the sums; top says in which unit they are measured, and gradients take it for a constant.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rookery.ops.dispatch import Backend, Op
from rookery.ops.wkv4 import native, reference, triton

OP = Op(
    "wkv4",
    [
        Backend("native", native.wkv4, native.why_not),
        Backend("triton", triton.wkv4, triton.why_not),
        Backend("reference", reference.wkv4),
    ],
)
NOTHING_YET = -1e38
"""`top` before the first token: e to it is zero, and sums with it stay finite in float32."""


def wkv4(
    *,
    log_w: Float[Tensor, " c"],
    u: Float[Tensor, " c"],
    k: Float[Tensor, "b t c"],
    v: Float[Tensor, "b t c"],
    state: Float[Tensor, "rows 3 c"] | None = None,
    cu_seqlens: Int[Tensor, " d+1"] | None = None,
    backend: str | None = None,
) -> tuple[Float[Tensor, "b t c"], Float[Tensor, "rows 3 c"]]:
    """The averages for t tokens, in the dtype of `v`, and the state after them.

    `log_w` ≤ 0 is the decay per token in the exponent (−exp(time_decay)), `u` the bonus of the token itself. `state`
    [rows, 3, c] is float32 (float64 for float64 inputs), empty where left out; it is not changed, and gradients flow to
    its two sums (that of `top` is zero). `cu_seqlens` [d + 1] cuts the single row into d documents (empty ones
    allowed), each with its own row of `state`. Raises BackendUnavailable if `backend` cannot run, ValueError for a
    state that does not fit.
    """
    rows = k.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if state is None:
        state = empty_state(rows, k.shape[2], like=k)
    if state.shape != (rows, 3, k.shape[2]):
        raise ValueError(f"state is {list(state.shape)}, expected [rows, 3, c] = {[rows, 3, k.shape[2]]}")
    return OP(backend=backend, log_w=log_w, u=u, k=k, v=v, state=state, cu_seqlens=cu_seqlens)


def empty_state(rows: int, channels: int, *, like: Tensor) -> Float[Tensor, "rows 3 c"]:
    """The state before the first token, for tensors such as `like`."""
    state = like.new_zeros(rows, 3, channels, dtype=torch.promote_types(like.dtype, torch.float32))
    state[:, 2] = NOTHING_YET
    return state
