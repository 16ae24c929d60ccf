"""The recurrence of RWKV-5 (arXiv 2404.05892, eq. 17-18): that of RWKV-6 with a decay that no token changes.

RWKV-5.0 and 5.1 have one decay and bonus per head, RWKV-5.2 one per channel; the former are the latter with equal
channels.
"""

from jaxtyping import Float, Int
from torch import Tensor

from rookery.ops.wkv6 import wkv6


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
    return wkv6(r=r, log_w=log_w.expand_as(r), k=k, v=v, u=u, state=state, cu_seqlens=cu_seqlens, backend=backend)
