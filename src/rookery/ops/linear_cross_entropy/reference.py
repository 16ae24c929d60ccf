"""Head and cross-entropy. This file is the definition: it holds all logits at once."""

# n tokens, c channels, v vocabulary

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy, linear


def linear_cross_entropy(
    *,
    features: Float[Tensor, "n c"],
    weight: Float[Tensor, "v c"],
    targets: Int[Tensor, " n"],
    ignore_index: int,
    l2wrap: float,
) -> Float[Tensor, ""]:
    logits = linear(features, weight).to(torch.promote_types(features.dtype, torch.float32))
    loss = cross_entropy(logits, targets, ignore_index=ignore_index)
    if l2wrap:
        # its gradient is l2wrap / n · max at the largest logit; its value is taken out again
        pull = l2wrap / 2 * logits.amax(dim=-1).square().mean()
        loss = loss + pull - pull.detach()
    return loss
