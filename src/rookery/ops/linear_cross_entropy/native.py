"""Head and cross-entropy on the CPU: chunks of tokens, with a compiled softmax that works in place."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rookery.ops.dispatch import native_module
from rookery.ops.linear_cross_entropy import chunked
from rookery.ops.native import addresses, elementwise_why_not, settings


def why_not(*, features: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, l2wrap: float) -> str | None:
    return elementwise_why_not(features, weight)


def linear_cross_entropy(
    *,
    features: Float[Tensor, "n c"],
    weight: Float[Tensor, "v c"],
    targets: Int[Tensor, " n"],
    ignore_index: int,
    l2wrap: float,
    chunk: int | None = None,
    isa: str = "",
) -> Float[Tensor, ""]:
    """As the reference. `chunk` is the number of tokens whose logits are held at a time, `isa` an instruction set."""

    def rows(logits: Tensor, targets: Tensor, ignore_index: int, scale: Tensor, pull: float, gradient: bool) -> Tensor:
        return softmax_rows(logits, targets, ignore_index, float(scale), pull, gradient, isa)

    return chunked.run(rows, features, weight, targets, ignore_index, l2wrap, chunk)


@torch.library.custom_op("rookery::cross_entropy_rows", mutates_args={"logits"})
def softmax_rows(
    logits: Tensor, targets: Tensor, ignore_index: int, scale: float, pull: float, gradient: bool, isa: str
) -> Tensor:
    """As `chunked.softmax_rows`; `logits` must be contiguous."""
    losses = torch.empty(targets.shape, dtype=torch.float32)
    targets = targets.to(torch.int64).contiguous()
    native_module().cross_entropy(
        **addresses(logits=logits, targets=targets, losses=losses),
        rows=logits.shape[0],
        vocabulary=logits.shape[1],
        ignored=ignore_index,
        scale=scale,
        pull=pull,
        gradient=gradient,
        **settings(logits, isa),
    )
    return losses


@softmax_rows.register_fake
def _(
    logits: Tensor, targets: Tensor, ignore_index: int, scale: float, pull: float, gradient: bool, isa: str
) -> Tensor:
    return torch.empty(targets.shape, dtype=torch.float32)
