"""ReLU² on the CPU: one pass forward, one backward."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rookery.ops.dispatch import native_module
from rookery.ops.native import addresses, elementwise_why_not, settings


def why_not(*, x: Tensor) -> str | None:
    return elementwise_why_not(x)


def relu_squared(*, x: Float[Tensor, "..."], isa: str = "") -> Float[Tensor, "..."]:
    """As the reference, with arithmetic in float32. `isa` forces an instruction set, "" takes the best one."""
    return forward(x, isa)


@torch.library.custom_op("rookery::relu_squared", mutates_args=())
def forward(x: Tensor, isa: str) -> Tensor:
    x = x.contiguous()
    y = torch.empty_like(x)
    native_module().relu_squared_forward(**addresses(x=x, y=y), count=x.numel(), **settings(x, isa))
    return y


@torch.library.custom_op("rookery::relu_squared_backward", mutates_args=())
def backward(x: Tensor, grad_y: Tensor, isa: str) -> Tensor:
    x, grad_y = x.contiguous(), grad_y.contiguous()
    grad_x = torch.empty_like(x)
    tensors = addresses(x=x, grad_y=grad_y, grad_x=grad_x)
    native_module().relu_squared_backward(**tensors, count=x.numel(), **settings(x, isa))
    return grad_x


@forward.register_fake
def _(x: Tensor, isa: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@backward.register_fake
def _(x: Tensor, grad_y: Tensor, isa: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, ctx.isa = inputs
    ctx.save_for_backward(x)


def _gradient(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None]:
    return backward(*ctx.saved_tensors, grad_y, ctx.isa), None


forward.register_autograd(_gradient, setup_context=_save)
