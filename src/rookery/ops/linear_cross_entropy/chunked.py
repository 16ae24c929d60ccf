"""Head and cross-entropy, a chunk of tokens at a time.

The gradients are computed in the forward pass, while a chunk's logits are at hand, and only scaled in the backward
pass: no logits are kept and no product is computed twice.
"""

# n tokens, c channels, v vocabulary

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

LOGITS = 1 << 24
"""Logits held at a time …"""
LEAST_TOKENS = 512
"""… but no fewer tokens than this: every chunk reads the weight and adds to its gradient once."""

Rows = Callable[..., Tensor]
"""(logits [n, v], targets [n], ignore_index, scale, pull, gradient) -> losses [n]: see `softmax_rows`."""


def linear_cross_entropy(
    *,
    features: Float[Tensor, "n c"],
    weight: Float[Tensor, "v c"],
    targets: Int[Tensor, " n"],
    ignore_index: int,
    l2wrap: float,
    chunk: int | None = None,
) -> Float[Tensor, ""]:
    """As the reference. `chunk` is the number of tokens whose logits are held at a time."""
    return run(softmax_rows, features, weight, targets, ignore_index, l2wrap, chunk)


def run(
    rows: Rows,
    features: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    l2wrap: float,
    chunk: int | None,
) -> Tensor:
    """The loss, with `rows` for the softmax of a chunk. Raises IndexError for targets outside the vocabulary."""
    vocabulary = weight.shape[0]
    # elsewhere the check would wait for the device, which checks by itself
    if targets.device.type == "cpu":
        wrong = (targets != ignore_index) & ((targets < 0) | (targets >= vocabulary))
        if wrong.any():
            raise IndexError(f"target {int(targets[wrong][0])} is not in the vocabulary of {vocabulary} tokens")
    chunk = chunk or max(LEAST_TOKENS, LOGITS // vocabulary)
    return Chunked.apply(features, weight, targets, ignore_index, l2wrap, chunk, rows, torch.is_grad_enabled())


class Chunked(torch.autograd.Function):
    """Computes the gradients forward, scales them backward."""

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        weight: Tensor,
        targets: Tensor,
        ignore_index: int,
        l2wrap: float,
        chunk: int,
        rows: Rows,
        grad_enabled: bool,
    ) -> Tensor:
        wants_features, wants_weight = (grad_enabled and wanted for wanted in ctx.needs_input_grad[:2])
        wide = torch.promote_types(features.dtype, torch.float32)
        counted = (targets != ignore_index).sum().to(wide)
        total = torch.zeros((), dtype=wide, device=features.device)
        grad_features = torch.empty_like(features) if wants_features else None
        grad_weight = WeightGradient(weight, single=chunk >= len(features)) if wants_weight else None
        for start in range(0, len(features), chunk):
            part = slice(start, start + chunk)
            logits = features[part] @ weight.T
            gradient = wants_features or wants_weight
            pull = l2wrap / len(features)
            total += rows(logits, targets[part], ignore_index, 1 / counted, pull, gradient).sum()
            # by now `logits` holds their gradient
            if wants_features:
                torch.mm(logits, weight, out=grad_features[part])
            if wants_weight:
                grad_weight.add(logits, features[part])
        ctx.save_for_backward(grad_features, grad_weight and grad_weight.total())
        return total / counted

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple:
        scaled = (None if grad is None else grad * upstream.to(grad.dtype) for grad in ctx.saved_tensors)
        return *scaled, None, None, None, None, None, None


class WeightGradient:
    """Sum of the chunks' gradients of the weight, in float32 unless there is one chunk only."""

    def __init__(self, weight: Tensor, *, single: bool) -> None:
        self.dtype = weight.dtype
        self.sum = (
            torch.zeros_like(weight, dtype=torch.promote_types(self.dtype, torch.float32)) if not single else None
        )
        self.single = torch.zeros_like(weight) if single else None

    def add(self, logits: Tensor, features: Tensor) -> None:
        if self.sum is None:
            torch.mm(logits.T, features, out=self.single)
        elif self.sum.dtype == self.dtype:
            self.sum.addmm_(logits.T, features)
        else:
            self.sum += logits.T @ features

    def total(self) -> Tensor:
        return self.single if self.sum is None else self.sum.to(self.dtype)


def softmax_rows(
    logits: Float[Tensor, "n v"],
    targets: Int[Tensor, " n"],
    ignore_index: int,
    scale: Tensor,
    pull: float,
    gradient: bool,
) -> Float[Tensor, " n"]:
    """Each row's cross-entropy, 0 where the target is ignored.

    With `gradient`, `logits` becomes scale · (softmax − one-hot target), without this term where the target is ignored,
    plus pull · largest at the largest logit, shared equally among equal ones.
    """
    counts = targets != ignore_index
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    index = torch.where(counts, targets, 0)[:, None]
    norm = wide.logsumexp(dim=-1, keepdim=True)
    losses = torch.where(counts, (norm - wide.gather(1, index))[:, 0], 0)
    if gradient:
        largest = wide.amax(dim=-1, keepdim=True)
        ties = wide == largest
        grads = (wide - norm).exp_()
        grads.scatter_add_(1, index, grads.new_full((1, 1), -1.0).expand_as(index))
        grads *= torch.where(counts, scale, 0)[:, None]
        if pull:
            grads += ties * (pull * largest / ties.sum(dim=-1, keepdim=True))
        logits.copy_(grads)
    return losses
