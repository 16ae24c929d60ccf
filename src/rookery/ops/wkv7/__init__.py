"""The recurrence of RWKV-7 (arXiv 2503.14456, eq. 16-18): a matrix per head that forgets, removes and writes.

    S_t = S_{t-1} diag(w_t) + (S_{t-1} a_t) b_tᵀ + v_t k_tᵀ        y_t = S_t r_t

with w = exp(log_w), a = −κ̂ and b = κ̂ ⊙ rate in RWKV-7's own words.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rookery.ops.dispatch import Backend, Op
from rookery.ops.wkv7 import chunked, native, reference, triton

OP = Op(
    "wkv7",
    [
        Backend("native", native.wkv7, native.why_not),
        Backend("triton", triton.wkv7, triton.why_not),
        Backend("chunked", chunked.wkv7, chunked.why_not),
        Backend("reference", reference.wkv7),
    ],
)


def wkv7(
    *,
    r: Float[Tensor, "b t h k"],
    log_w: Float[Tensor, "b t h k"],
    k: Float[Tensor, "b t h k"],
    v: Float[Tensor, "b t h v"],
    a: Float[Tensor, "b t h k"],
    b: Float[Tensor, "b t h k"],
    state: Float[Tensor, "rows h v k"] | None = None,
    cu_seqlens: Int[Tensor, " d+1"] | None = None,
    backend: str | None = None,
) -> tuple[Float[Tensor, "b t h v"], Float[Tensor, "rows h v k"]]:
    """The outputs for t tokens, in the dtype of `v`, and the state after them.

    `log_w` is the natural logarithm of the decay: ≤ 0, and ≥ −0.6066 for RWKV-7, which the chunked backends rely on.
    `state` is the matrix before the first token, float32 (float64 for float64 inputs), zero where left out; it is not
    changed, and gradients flow to it. `cu_seqlens` [d + 1] cuts the single row into d documents (empty ones allowed),
    each with its own row of `state`. Raises BackendUnavailable if `backend` cannot run, ValueError for shapes that do
    not fit.
    """
    rows = r.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    expected = (rows, r.shape[2], v.shape[3], r.shape[3])
    if state is None:
        state = r.new_zeros(expected, dtype=torch.promote_types(r.dtype, torch.float32))
    if state.shape != expected:
        raise ValueError(f"state is {list(state.shape)}, expected [rows, head, value, key] = {list(expected)}")
    return OP(backend=backend, r=r, log_w=log_w, k=k, v=v, a=a, b=b, state=state, cu_seqlens=cu_seqlens)
