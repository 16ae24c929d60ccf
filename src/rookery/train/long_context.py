"""Rows longer than memory: in pieces one after the other, or in parts on several processes. The state connects them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from rookery.data.packing import IGNORED, PackedBatch
from rookery.nn.language_model import LanguageModel
from rookery.ops.linear_cross_entropy import linear_cross_entropy
from rookery.ops.wkv7 import wkv7
from rookery.state import State
from rookery.train.config import LongCEConfig


def backward_in_pieces(
    model: LanguageModel,
    inputs: Tensor,
    targets: Tensor,
    length: int,
    *,
    through: bool = False,
    weight: float = 1.0,
    l2wrap: float = 0.0,
) -> Tensor:
    """Adds the gradients of weight × mean cross-entropy of rows [b, t] read `length` tokens at a time; gives the mean.

    Only one piece's activations are held at a time. The state is carried from piece to piece. Without `through` no
    gradient crosses a border (truncated backpropagation). With it the gradients are those of whole rows: a first
    reading keeps the states at the borders, a second one goes from the last piece to the first and hands the gradient
    of each piece's start state to the one before.
    """
    halves = zip(inputs.split(length, 1), targets.split(length, 1))
    pieces = [Piece(some, wanted, None, None, some.shape[1] / inputs.shape[1]) for some, wanted in halves]
    return _backward(model, pieces, None, through=through, weight=weight, l2wrap=l2wrap)


def backward_documents_in_pieces(
    model: LanguageModel,
    batch: PackedBatch,
    length: int,
    start: Callable[[int], State] | None = None,
    *,
    through: bool = False,
    weight: float = 1.0,
    l2wrap: float = 0.0,
) -> Tensor:
    """As `backward_in_pieces`, of packed documents: `length` tokens of each at a time. The mean is over learned tokens.

    `start` gives the state that so many documents begin with. Without `through` it learns from first pieces alone.
    """
    return _backward(model, document_pieces(batch, length), start, through=through, weight=weight, l2wrap=l2wrap)


class Piece(NamedTuple):
    """What goes through the model at a time."""

    inputs: Tensor
    targets: Tensor
    cu_seqlens: Tensor | None
    """Borders, where these are documents."""
    rows: list[int] | None
    """Which of the documents of the piece before go on, None for all."""
    share: float
    """Of the mean loss."""


def document_pieces(batch: PackedBatch, length: int) -> list[Piece]:
    """The first `length` tokens of each document, then the next ones of those that go on, and so forth."""
    ends = batch.cu_seqlens.tolist()
    going, rows, at, found = list(range(len(ends) - 1)), None, 0, []
    total = int((batch.targets != IGNORED).sum()) or 1
    while going:
        spans = [(ends[i] + at, min(ends[i] + at + length, ends[i + 1])) for i in going]
        places = torch.cat([torch.arange(a, b) for a, b in spans]).to(batch.inputs.device)
        borders = batch.cu_seqlens.new_tensor([0, *(b - a for a, b in spans)]).cumsum(0)
        targets = batch.targets[:, places]
        share = int((targets != IGNORED).sum()) / total
        found.append(Piece(batch.inputs[:, places], targets, borders, rows, share))
        at += length
        rows = [i for i, document in enumerate(going) if ends[document] + at < ends[document + 1]]
        going = [going[i] for i in rows]
    return found


def _backward(
    model: LanguageModel,
    pieces: list[Piece],
    start: Callable[[int], State] | None,
    *,
    through: bool,
    weight: float,
    l2wrap: float,
) -> Tensor:
    def begin() -> State | None:
        return start and start(len(pieces[0].cu_seqlens) - 1)

    total = pieces[0].inputs.new_zeros((), dtype=torch.float32)
    if not through:
        state = begin()
        for piece in pieces:
            with torch.set_grad_enabled(bool(piece.share)):
                features, state = model.features(piece.inputs, _going_on(state, piece), piece.cu_seqlens)
                found = _loss(model, features, piece, l2wrap)
            if found.requires_grad:  # a start state learns from first pieces alone
                (found * (piece.share * weight)).backward()
            total += found.detach() * piece.share
            state = state.detach()
        return total

    starts = _starts(model, pieces, begin())
    after: dict[str, Tensor] = {}
    for index, piece in reversed(list(enumerate(pieces))):
        state = starts[index].map(_leaf) if index else begin()
        features, end = model.features(piece.inputs, state, piece.cu_seqlens)
        found = _loss(model, features, piece, l2wrap)
        total += found.detach() * piece.share
        if after:
            end = _going_on(end, pieces[index + 1])
        ends = {name: t for name, t in end.tensors().items() if name in after and t.requires_grad}
        gradients = [found.new_tensor(piece.share * weight), *(after[n] for n in ends)]
        torch.autograd.backward([found, *ends.values()], gradients)
        if index:
            after = {name: t.grad for name, t in state.tensors().items() if t.grad is not None}
    return total


def _loss(model: LanguageModel, features: Tensor, piece: Piece, l2wrap: float) -> Tensor:
    """Mean over what is learned in the piece."""
    features, wanted = features.flatten(0, 1), piece.targets.flatten()
    if not piece.share:  # nothing, but what comes later may learn from what was read
        return features.sum() * 0
    if piece.cu_seqlens is not None:
        learned = wanted != IGNORED
        features, wanted = features[learned], wanted[learned]
    return linear_cross_entropy(features=features, weight=model.head.weight, targets=wanted, l2wrap=l2wrap)


@torch.no_grad()
def _starts(model: LanguageModel, pieces: list[Piece], state: State | None) -> list[State | None]:
    """The state that each piece begins with; of the first one, which is given, None."""
    starts: list[State | None] = [None]
    for piece, following in itertools.pairwise(pieces):
        state = _going_on(model.features(piece.inputs, state, piece.cu_seqlens)[1], following)
        starts.append(state)
    return starts


def _going_on(state: State | None, piece: Piece) -> State | None:
    """The rows of `state` that `piece` begins with."""
    return state if piece.rows is None or state is None else state.select(piece.rows)


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_(tensor.is_floating_point())


def longce_loss(
    model: LanguageModel, inputs: Tensor, targets: Tensor, how: LongCEConfig, l2wrap: float = 0.0
) -> Tensor:
    """Mean of weight × cross-entropy in nats of `targets` [b, t] after `inputs` [b, t]; see `LongCEConfig`."""
    features, _ = model.features(inputs, None, None)
    losses, pull = token_losses(features, model.head.weight, targets, l2wrap)
    weights = longce_weights(model, inputs, targets, losses.detach(), how)
    # the pull on the largest logits has a gradient and no value
    return (weights * losses).mean() + pull - pull.detach()


@torch.no_grad()
def longce_weights(model: LanguageModel, inputs: Tensor, targets: Tensor, full: Tensor, how: LongCEConfig) -> Tensor:
    """Weights [b, t] from the losses `full` [b, t] of whole rows and those of readings that begin later.

    A reading begins at every `stride` tokens from `truncation` on; it weighs the `stride` tokens (the last reading: all
    that are left) that follow its first `truncation` ones.
    """
    short, stride, length = how.truncation, how.stride or how.truncation, inputs.shape[1]
    weights = torch.ones_like(full)
    for start in range(short, length - short, stride):
        part = slice(start, min(start + short + stride, length))
        features, _ = model.features(inputs[:, part], None, None)
        losses, _ = token_losses(features[:, short:], model.head.weight, targets[:, part][:, short:])
        weighed = slice(start + short, part.stop)
        weights[:, weighed] = (losses - full[:, weighed]).exp().clamp(how.floor, how.cap)
    return weights / weights.mean() if how.normalise else weights


def token_losses(
    features: Tensor, weight: Tensor, targets: Tensor, l2wrap: float = 0.0, at_once: int = 1024
) -> tuple[Tensor, Tensor]:
    """Cross-entropy [b, t] in float32, and what `l2wrap` pulls by; logits of `at_once` tokens are held at a time."""

    def some(features: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = (features @ weight.T).float()
        largest = logits.amax(dim=-1)
        return cross_entropy(logits, targets, reduction="none"), (largest * largest.detach()).sum()

    found = [
        checkpoint(some, part, weight, wanted, use_reentrant=False)
        for part, wanted in zip(features.flatten(0, 1).split(at_once), targets.flatten().split(at_once))
    ]
    losses, pulls = zip(*found)
    return torch.cat(losses).view(targets.shape), torch.stack(pulls).sum() * (l2wrap / targets.numel())


class _Gather(torch.autograd.Function):
    """The tensors of all processes of a group, stacked; the gradient of each comes back from all of them."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(tensor) for _ in range(group.size())]
        dist.all_gather(parts, tensor.contiguous(), group)
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad[ctx.group.rank()], None


def share_sequences(model: nn.Module, group: dist.ProcessGroup) -> None:
    """Makes an RWKV-7 read each row as parts on the processes of `group`, in the order of their ranks, in place.

    Every process gives the model its own part of the tokens, no state, and all parts must be of one length. What a
    process needs of those before it are the last inputs of each token shift and the state at its start. The end state
    of a part is linear in its start state, S_end = S_start P + C (core.md 1.5), so that all processes work at once:
    each computes P and C of its part, all exchange them, and each puts together the start it needs. Raises ValueError
    for other families.
    """
    if model.family != "rwkv7":
        raise ValueError(f"context_parallel works with rwkv7 so far, not with {model.family}")
    for block in model.blocks:
        block.att.recurrence = partial(parallel_wkv7, group=group)
        for mix in (block.att, block.ffn):
            mix.register_forward_pre_hook(partial(_shift_from_before, group=group))


def _shift_from_before(_module: nn.Module, args: tuple, group: dist.ProcessGroup) -> tuple:
    x, shift, *rest = args
    last = _Gather.apply(x[:, -1], group)
    # every process uses what was gathered, be it times 0: the gradient's exchange needs all of them
    before = torch.zeros(group.size(), 1, 1, dtype=x.dtype, device=x.device)
    if group.rank():
        before[group.rank() - 1] = 1
    return (x, (last * before).sum(0).to(shift.dtype), *rest)


def parallel_wkv7(
    *,
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor,
    group: dist.ProcessGroup,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`wkv7` on this process's part of the rows, begun where the parts before it end; `state` must be zero."""
    if cu_seqlens is not None:
        raise ValueError("packed documents cannot be shared among processes; use context_parallel=1")
    rows, _, heads, width = k.shape
    identity = torch.eye(width, dtype=state.dtype, device=state.device).expand(rows, heads, width, width)
    nothing = torch.zeros_like(k)
    # what the part makes of a start state (P), and what it ends with from none (C)
    _, passed = wkv7(r=nothing, log_w=log_w, k=nothing, v=nothing.to(v.dtype), a=a, b=b, state=identity.contiguous())
    _, added = wkv7(r=r, log_w=log_w, k=k, v=v, a=a, b=b, state=state)
    parts = _Gather.apply(torch.cat([passed, added], dim=2), group)
    for rank in range(group.size()):
        after = state @ parts[rank, :, :, :width] + parts[rank, :, :, width:]
        before_this = torch.tensor(rank < group.rank(), device=state.device)
        state = torch.where(before_this, after, state)
    return wkv7(r=r, log_w=log_w, k=k, v=v, a=a, b=b, state=state)
