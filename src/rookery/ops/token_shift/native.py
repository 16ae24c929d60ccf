"""Token shift on the CPU: all mixtures in one pass forward; backward, one pass for x, mix and previous together."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rookery.ops.dispatch import native_module
from rookery.ops.native import addresses, elementwise_why_not, settings


def why_not(*, x: Tensor, mix: Tensor, previous: Tensor, cu_seqlens: Tensor | None = None) -> str | None:
    return elementwise_why_not(x, previous, parameters=(mix,))


def token_shift(
    *,
    x: Float[Tensor, "b t c"],
    mix: Float[Tensor, "n c"],
    previous: Float[Tensor, "rows c"],
    cu_seqlens: Int[Tensor, " d+1"] | None = None,
    isa: str = "",
) -> tuple[Float[Tensor, "n b t c"], Float[Tensor, "rows c"]]:
    """As the reference, with arithmetic in float32. `isa` forces an instruction set, "" takes the best one."""
    return forward(x, mix.to(torch.float32), previous, cu_seqlens, isa)


@torch.library.custom_op("rookery::token_shift", mutates_args=())
def forward(x: Tensor, mix: Tensor, previous: Tensor, cu_seqlens: Tensor | None, isa: str) -> tuple[Tensor, Tensor]:
    x, mix, previous = x.contiguous(), mix.contiguous(), previous.contiguous()
    out, last = x.new_empty(mix.shape[0], *x.shape), torch.empty_like(previous)
    native_module().token_shift_forward(
        **addresses(x=x, mix=mix, previous=previous, out=out, last=last),
        starts=_starts(x, cu_seqlens),
        channels=mix.shape[1],
        mixes=mix.shape[0],
        **settings(x, isa),
    )
    return out, last


@torch.library.custom_op("rookery::token_shift_backward", mutates_args=())
def backward(
    x: Tensor,
    mix: Tensor,
    previous: Tensor,
    cu_seqlens: Tensor | None,
    grad_out: Tensor,
    grad_last: Tensor,
    isa: str,
) -> tuple[Tensor, Tensor, Tensor]:
    x, mix, previous = x.contiguous(), mix.contiguous(), previous.contiguous()
    grad_out, grad_last = grad_out.contiguous(), grad_last.contiguous()
    grad_x, grad_mix, grad_previous = (torch.empty_like(tensor) for tensor in (x, mix, previous))
    native_module().token_shift_backward(
        **addresses(x=x, mix=mix, previous=previous, grad_out=grad_out, grad_last=grad_last),
        **addresses(grad_x=grad_x, grad_mix=grad_mix, grad_previous=grad_previous),
        starts=_starts(x, cu_seqlens),
        channels=mix.shape[1],
        mixes=mix.shape[0],
        **settings(x, isa),
    )
    return grad_x, grad_mix, grad_previous


def _starts(x: Tensor, cu_seqlens: Tensor | None) -> list[int]:
    """Where each row's tokens begin among the b · t, and their end."""
    if cu_seqlens is not None:
        return cu_seqlens.tolist()
    batch, time = x.shape[:2]
    return [row * time for row in range(batch + 1)]


@forward.register_fake
def _(x: Tensor, mix: Tensor, previous: Tensor, cu_seqlens: Tensor | None, isa: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(mix.shape[0], *x.shape), previous.new_empty(previous.shape)


@backward.register_fake
def _(
    x: Tensor,
    mix: Tensor,
    previous: Tensor,
    cu_seqlens: Tensor | None,
    grad_out: Tensor,
    grad_last: Tensor,
    isa: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), mix.new_empty(mix.shape), previous.new_empty(previous.shape)


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, mix, previous, cu_seqlens, ctx.isa = inputs
    ctx.save_for_backward(x, mix, previous, cu_seqlens)


def _gradient(ctx: Any, grad_out: Tensor, grad_last: Tensor) -> tuple:
    return *backward(*ctx.saved_tensors, grad_out, grad_last, ctx.isa), None, None


forward.register_autograd(_gradient, setup_context=_save)
