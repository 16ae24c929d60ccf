"""Token shift: every token sees the one before it, in several learned mixtures (RWKV-7 paper eq. 3).

y_j[t] = x[t] + (x[t−1] − x[t]) ⊙ mix_j
"""

from jaxtyping import Float, Int
from torch import Tensor

from rookery.ops.dispatch import Backend, Op
from rookery.ops.token_shift import native, reference, triton

OP = Op(
    "token_shift",
    [
        Backend("native", native.token_shift, native.why_not),
        Backend("triton", triton.token_shift, triton.why_not),
        Backend("reference", reference.token_shift),
    ],
)


def token_shift(
    *,
    x: Float[Tensor, "b t c"],
    mix: Float[Tensor, "n c"],
    previous: Float[Tensor, "rows c"] | None = None,
    cu_seqlens: Int[Tensor, " d+1"] | None = None,
    backend: str | None = None,
) -> tuple[Float[Tensor, "n b t c"], Float[Tensor, "rows c"]]:
    """The n mixtures of every token with the one before it, and each row's last token (the next call's `previous`).

    `previous` [rows, c] is what came before the first token, zero where left out. `cu_seqlens` [d + 1] cuts the single
    row into documents that do not see each other; empty ones keep their `previous`.
    """
    rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if previous is None:
        previous = x.new_zeros(rows, x.shape[2])
    if previous.shape != (rows, x.shape[2]):
        raise ValueError(f"previous is {list(previous.shape)}, expected [rows, c] = {[rows, x.shape[2]]}")
    return OP(backend=backend, x=x, mix=mix, previous=previous, cu_seqlens=cu_seqlens)
