"""From RWKV-7's projections to the inputs of its recurrence (arXiv 2503.14456, eq. 5-15).

log_w = −e^(−1/2) σ(decay_logit)      rate = σ(rate_logit)
κ̂ = (k ⊙ k_k) / ‖k ⊙ k_k‖ per head     k ← k ⊙ (1 + (rate − 1) ⊙ k_a)      a = −κ̂      b = κ̂ ⊙ rate
"""

from jaxtyping import Float
from torch import Tensor

from rookery.ops.dispatch import Backend, Op
from rookery.ops.wkv7_inputs import native, reference, triton

OP = Op(
    "wkv7_inputs",
    [
        Backend("native", native.wkv7_inputs, native.why_not),
        Backend("triton", triton.wkv7_inputs, triton.why_not),
        Backend("reference", reference.wkv7_inputs),
    ],
)


def wkv7_inputs(
    *,
    k: Float[Tensor, "b t c"],
    decay_logit: Float[Tensor, "b t c"],
    rate_logit: Float[Tensor, "b t c"],
    k_k: Float[Tensor, " c"],
    k_a: Float[Tensor, " c"],
    head_dim: int,
    backend: str | None = None,
) -> tuple[Float[Tensor, "b t h n"], Float[Tensor, "b t h n"], Float[Tensor, "b t h n"], Float[Tensor, "b t h n"]]:
    """`log_w`, `k`, `a` and `b` for `rookery.ops.wkv7`, per head.

    `log_w` is float32 (float64 for float64 inputs) whatever the dtype of the others, which is that of `k`.
    """
    if k.shape[-1] % head_dim:
        raise ValueError(f"width {k.shape[-1]} is not a multiple of head_dim {head_dim}")
    return OP(backend=backend, k=k, decay_logit=decay_logit, rate_logit=rate_logit, k_k=k_k, k_a=k_a, head_dim=head_dim)
