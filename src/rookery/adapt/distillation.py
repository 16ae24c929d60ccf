"""A student learns its teacher's distribution of every next token: forward, adaptive and truncated divergences."""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# n tokens, c width, k kept tokens, v vocabulary

CHUNK = 512
"""Tokens whose logits are held at a time."""


def forward_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher ‖ student) in nats, [n], of logits [n, v]; 0 exactly where both are the same."""
    p, q = teacher.float().log_softmax(-1), student.float().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def adaptive_kl(student: Tensor, teacher: Tensor, head: float = 0.5) -> Tensor:
    """Forward and reverse KL [n], weighted by where the distributions differ (arXiv 2404.02657, as ARWKV uses it).

    The teacher's head is its likeliest tokens up to a mass of at least `head`; the share of the L1 distance there
    weighs the forward divergence, the rest the reverse one.
    """
    p, q = teacher.float().log_softmax(-1), student.float().log_softmax(-1)
    order = p.argsort(-1, descending=True)
    mass = p.exp().gather(-1, order)
    before = mass.cumsum(-1) - mass
    in_head = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before < head)
    gap = (p.exp() - q.exp()).abs().detach()
    total = gap.sum(-1)
    share = torch.where(total > 0, gap.where(in_head, 0).sum(-1) / total.clamp(min=1e-30), 1.0)
    return share * (p.exp() * (p - q)).sum(-1) + (1 - share) * (q.exp() * (q - p)).sum(-1)


def top_k(teacher: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k likeliest tokens [n, k] of logits [n, v], and ln p [n, k + 1] of them and of all others together."""
    p = teacher.float().log_softmax(-1)
    found, ids = p.topk(k, dim=-1)
    return ids, torch.cat([found, _rest(found)], dim=-1)


def top_k_kl(student: Tensor, ids: Tensor, log_probs: Tensor) -> Tensor:
    """Forward KL [n] on k + 1 buckets: the kept tokens and the rest. A lower bound of the KL over the vocabulary."""
    p = log_probs.float().log_softmax(-1)  # rounded ones do not add up to 1
    q = student.float().log_softmax(-1).gather(-1, ids)
    return (p.exp() * (p - torch.cat([q, _rest(q)], dim=-1))).sum(-1)


def _rest(log_probs: Tensor) -> Tensor:
    """ln(1 − Σ p), [n, 1]; the mass is taken for 1e-7 where rounding leaves less."""
    return torch.log1p(-log_probs.exp().sum(-1, keepdim=True).clamp(max=1 - 1e-7))


def distillation_loss(
    features: Tensor,
    head: Tensor,
    teacher_features: Tensor,
    teacher_head: Tensor,
    *,
    adaptive: bool = False,
    chunk: int = CHUNK,
) -> Tensor:
    """Mean divergence in nats a token from features [n, c] and heads [v, c] of both, `chunk` tokens' logits at a time.

    Tokens that only the teacher's head knows (padding of its vocabulary) are left out.
    """

    def some(mine: Tensor, theirs: Tensor) -> Tensor:
        logits, wanted = mine @ head.T, theirs @ teacher_head[: head.shape[0]].T
        return (adaptive_kl if adaptive else forward_kl)(logits, wanted).sum()

    return _summed(some, chunk, features, teacher_features)


def cached_loss(features: Tensor, head: Tensor, ids: Tensor, log_probs: Tensor, *, chunk: int = CHUNK) -> Tensor:
    """The same on the k + 1 buckets of `top_k`."""
    return _summed(lambda mine, some, p: top_k_kl(mine @ head.T, some, p).sum(), chunk, features, ids, log_probs)


def _summed(some, chunk: int, *tensors: Tensor) -> Tensor:
    """Mean over tokens of what `some` sums; logits are computed again in the backward pass instead of kept."""
    parts = zip(*(tensor.split(chunk) for tensor in tensors), strict=True)
    return sum(checkpoint(some, *part, use_reentrant=False) for part in parts) / len(tensors[0])
