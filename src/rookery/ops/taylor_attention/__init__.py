"""Linear attention with the second-order Taylor polynomial of exp as its kernel (BASED, arXiv 2402.18668, section 4).

With u = q·k / √d for keys of d channels, and φ such that φ(q)·φ(k) = 1 + u + u²/2, which is ½ at least:

y_t = Σ_i (φ(q_t)·φ(k_i)) v_i / Σ_i φ(q_t)·φ(k_i)  for i ≤ t        S_t = S_{t-1} + [v_t; 1] φ(k_t)ᵀ

The last row of the state sums the features themselves, the denominators; `features.py` says what φ is. The sum over
tokens never forgets: in bfloat16 it would stand still at 256 tokens, so the state is float32 at least.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rookery.ops.dispatch import Backend, Op
from rookery.ops.taylor_attention import chunked, native, reference, triton
from rookery.ops.taylor_attention.features import size

OP = Op(
    "taylor_attention",
    [
        Backend("native", native.taylor_attention, native.why_not),
        Backend("triton", triton.taylor_attention, triton.why_not),
        Backend("chunked", chunked.taylor_attention),
        Backend("reference", reference.taylor_attention),
    ],
)


def taylor_attention(
    *,
    q: Float[Tensor, "b t h k"],
    k: Float[Tensor, "b t h k"],
    v: Float[Tensor, "b t h v"],
    state: Float[Tensor, "rows h v+1 f"] | None = None,
    cu_seqlens: Int[Tensor, " d+1"] | None = None,
    backend: str | None = None,
) -> tuple[Float[Tensor, "b t h v"], Float[Tensor, "rows h v+1 f"]]:
    """The outputs for t tokens, in the dtype of `v`, and the state after them.

    `state` [rows, h, v + 1, f] with f = 1 + k + k (k + 1) / 2 is float32 (float64 for float64 inputs), zero where left
    out; it is not changed, and gradients flow to it. `cu_seqlens` [d + 1] cuts the single row into d documents (empty
    ones allowed), each with its own row of `state`. The native and Triton backends are one fused step: they take one
    token a row. Raises BackendUnavailable if `backend` cannot run, ValueError for shapes that do not fit.
    """
    rows = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    expected = (rows, q.shape[2], v.shape[3] + 1, size(q.shape[3]))
    if state is None:
        state = q.new_zeros(expected, dtype=torch.promote_types(q.dtype, torch.float32))
    if state.shape != expected:
        raise ValueError(f"state is {list(state.shape)}, expected [rows, head, value + 1, features] = {list(expected)}")
    return OP(backend=backend, q=q, k=k, v=v, state=state, cu_seqlens=cu_seqlens)
