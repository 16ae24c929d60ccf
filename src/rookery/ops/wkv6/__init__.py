"""The recurrence of RWKV-6 (arXiv 2404.05892, eq. 19-20): a matrix per head that forgets channel by channel.

y_t = (S_{t-1} + v_t (u ⊙ k_t)ᵀ) r_t        S_t = S_{t-1} diag(w_t) + v_t k_tᵀ        w = exp(log_w)
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rookery.ops.dispatch import Backend, Op
from rookery.ops.wkv6 import chunked, native, reference, triton

OP = Op(
    "wkv6",
    [
        Backend("native", native.wkv6, native.why_not),
        Backend("triton", triton.wkv6, triton.why_not),
        Backend("chunked", chunked.wkv6),
        Backend("reference", reference.wkv6),
    ],
)


def wkv6(
    *,
    r: Float[Tensor, "b t h k"],
    log_w: Float[Tensor, "b t h k"],
    k: Float[Tensor, "b t h k"],
    v: Float[Tensor, "b t h v"],
    u: Float[Tensor, "h k"],
    state: Float[Tensor, "rows h v k"] | None = None,
    cu_seqlens: Int[Tensor, " d+1"] | None = None,
    backend: str | None = None,
) -> tuple[Float[Tensor, "b t h v"], Float[Tensor, "rows h v k"]]:
    """The outputs for t tokens, in the dtype of `v`, and the state after them.

    `log_w` ≤ 0 is the natural logarithm of the decay; it has no lower bound (a decay of 0 in float32 is allowed). `u`
    is the bonus of the token itself. `state` is the matrix before the first token, value × key (the papers and official
    files write key × value), float32 (float64 for float64 inputs), zero where left out; it is not changed, and
    gradients flow to it. `cu_seqlens` [d + 1] cuts the single row into d documents (empty ones allowed), each with its
    own row of `state`. Raises BackendUnavailable if `backend` cannot run, ValueError for shapes that do not fit.
    """
    rows = r.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    expected = (rows, r.shape[2], v.shape[3], r.shape[3])
    if state is None:
        state = r.new_zeros(expected, dtype=torch.promote_types(r.dtype, torch.float32))
    if state.shape != expected:
        raise ValueError(f"state is {list(state.shape)}, expected [rows, head, value, key] = {list(expected)}")
    return OP(backend=backend, r=r, log_w=log_w, k=k, v=v, u=u, state=state, cu_seqlens=cu_seqlens)
