"""ReLU² in Triton: one pass forward, one backward."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rookery.ops.triton import PROGRAM, elementwise_why_not


def why_not(*, x: Tensor) -> str | None:
    return elementwise_why_not(x)


def relu_squared(*, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """As the reference, with arithmetic in float32."""
    return forward(x)


@torch.library.custom_op("rookery::relu_squared_triton", mutates_args=())
def forward(x: Tensor) -> Tensor:
    from rookery.ops.relu_squared.triton_kernels import square

    x = x.contiguous()
    y = torch.empty_like(x)
    if x.numel():
        with torch.cuda.device_of(x):
            square[(-(-x.numel() // PROGRAM),)](x, y, x.numel(), BLOCK=PROGRAM)
    return y


@torch.library.custom_op("rookery::relu_squared_triton_backward", mutates_args=())
def backward(x: Tensor, grad_y: Tensor) -> Tensor:
    from rookery.ops.relu_squared.triton_kernels import square_backward

    x, grad_y = x.contiguous(), grad_y.contiguous()
    grad_x = torch.empty_like(x)
    if x.numel():
        with torch.cuda.device_of(x):
            square_backward[(-(-x.numel() // PROGRAM),)](x, grad_y, grad_x, x.numel(), BLOCK=PROGRAM)
    return grad_x


@forward.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@backward.register_fake
def _(x: Tensor, grad_y: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradient(ctx: Any, grad_y: Tensor) -> Tensor:
    return backward(*ctx.saved_tensors, grad_y)


forward.register_autograd(_gradient, setup_context=_save)
