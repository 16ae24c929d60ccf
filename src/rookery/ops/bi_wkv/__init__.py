"""The attention of Vision-RWKV (arXiv 2403.02308): an average of all values, whose weights change with the distance.

    y_t = Σ_i e^(E_ti) v_i / Σ_i e^(E_ti)        E_ti = k_i − ω (|t − i| − 1) for i ≠ t,  E_tt = k_t + μ

ω is a decay (growth where it is negative) per token of distance and μ the bonus of the token itself, both per channel.
Vision-RWKV divides its parameters by the number of tokens of the call, so that no exponent grows with the resolution.

The kernel that the checkpoints were trained with starts each of its 32 chunks with one factor e^−ω too many, and its
recurrence does not take it back. `compat="cuda32"` computes what that kernel does, for bit-faithful evaluation.
"""

from typing import Literal

from jaxtyping import Float
from torch import Tensor

from rookery.ops.bi_wkv import chunked, cumsum, native, reference, triton
from rookery.ops.dispatch import Backend, Op

OP = Op(
    "bi_wkv",
    [
        Backend("native", native.bi_wkv, native.why_not),
        Backend("triton", triton.bi_wkv, triton.why_not),
        Backend("cumsum", cumsum.bi_wkv, cumsum.why_not),
        Backend("chunked", chunked.bi_wkv, chunked.why_not),
        Backend("reference", reference.bi_wkv),
    ],
)


def bi_wkv(
    *,
    omega: Float[Tensor, " c"],
    mu: Float[Tensor, " c"],
    k: Float[Tensor, "b t c"],
    v: Float[Tensor, "b t c"],
    compat: Literal["exact", "cuda32"] = "exact",
    backend: str | None = None,
) -> Float[Tensor, "b t c"]:
    """The averages for t tokens, in the dtype of `v`; sums are float32 (float64 for float64 inputs).

    `compat` "cuda32" is the released kernel's variant, in quadratic time. Raises BackendUnavailable if `backend` cannot
    run, ValueError for another `compat` or for shapes that do not fit.
    """
    if compat not in ("exact", "cuda32"):
        raise ValueError(f'compat is {compat!r}, expected "exact" or "cuda32"')
    channels = (k.shape[2],)
    if k.shape != v.shape or omega.shape != channels or mu.shape != channels:
        found = ", ".join(f"{name} {list(x.shape)}" for name, x in (("omega", omega), ("mu", mu), ("k", k), ("v", v)))
        raise ValueError(f"bi_wkv takes omega and mu [c], k and v [b, t, c]; these are {found}")
    return OP(backend=backend, omega=omega, mu=mu, k=k, v=v, compat=compat)
