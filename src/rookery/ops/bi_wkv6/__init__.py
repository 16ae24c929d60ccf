"""RWKV-6's recurrence in both directions, the attention of Vision-RWKV6 and RWKV-CLIP (arXiv 2406.06973).

    y_t = r_tᵀ (Σ_{i≠t} diag(Π_{j between t and i} w_j) k_i v_iᵀ + diag(u) k_t v_tᵀ)        w = exp(log_w)

Neighbours are not decayed, and the token itself counts once. It is wkv6 forwards plus wkv6 backwards without its bonus.
"""

from jaxtyping import Float
from torch import Tensor

from rookery.ops.bi_wkv6 import reference, scans
from rookery.ops.dispatch import Backend, Op

OP = Op("bi_wkv6", [Backend("scans", scans.bi_wkv6), Backend("reference", reference.bi_wkv6)])


def bi_wkv6(
    *,
    r: Float[Tensor, "b t h k"],
    log_w: Float[Tensor, "b t h k"],
    k: Float[Tensor, "b t h k"],
    v: Float[Tensor, "b t h v"],
    u: Float[Tensor, "h k"],
    backend: str | None = None,
) -> Float[Tensor, "b t h v"]:
    """The outputs for t tokens, in the dtype of `v`.

    `log_w` ≤ 0 is the natural logarithm of the decay, `u` the bonus of the token itself. The backend "scans" runs on
    the best backend of `rookery.ops.wkv6`, so on GPUs too.
    """
    return OP(backend=backend, r=r, log_w=log_w, k=k, v=v, u=u)
