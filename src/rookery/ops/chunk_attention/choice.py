"""Which complete chunks a query attends to."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@torch.no_grad()
def liked_chunks(
    q: Float[Tensor, "r t h n"], means: Float[Tensor, "r c h n"], own: Int[Tensor, "r t"], count: int
) -> tuple[Int[Tensor, "r h t k"], Bool[Tensor, "r h t k"]]:
    """The (at most) `count` chunks before chunk `own` with the largest q · mean, and which of them there are.

    Later chunks win where the products are equal.
    """
    gate = torch.einsum("rthn,rchn->rhtc", q.to(means.dtype), means)
    chunks = torch.arange(means.shape[1], device=q.device)
    earlier = (chunks < own[..., None])[:, None]
    gate = gate.masked_fill(~earlier, -torch.inf).flip(-1)
    if count == 1:
        best = gate.argmax(dim=-1, keepdim=True)
    else:
        # topk leaves the order of equal values open, a stable sort does not
        best = gate.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    best = means.shape[1] - 1 - best
    return best, best < own[:, None, :, None]
