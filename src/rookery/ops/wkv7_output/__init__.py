"""From the output of RWKV-7's recurrence to the input of its output projection (arXiv 2503.14456, eq. 19-21).

(GroupNorm_h(y) + (Σ r ⊙ k ⊙ r_k) v) ⊙ gate
"""

from jaxtyping import Float
from torch import Tensor

from rookery.ops.dispatch import Backend, Op
from rookery.ops.wkv7_output import native, reference, triton

OP = Op(
    "wkv7_output",
    [
        Backend("native", native.wkv7_output, native.why_not),
        Backend("triton", triton.wkv7_output, triton.why_not),
        Backend("reference", reference.wkv7_output),
    ],
)


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
    backend: str | None = None,
) -> Float[Tensor, "b t c"]:
    """The normalised, boosted and gated output [b, t, c], in the dtype of `gate`.

    `weight` and `bias` are the affine part of the norm over the channels of each head, `eps` its epsilon.
    """
    return OP(backend=backend, y=y, r=r, k=k, v=v, gate=gate, r_k=r_k, weight=weight, bias=bias, eps=eps)
