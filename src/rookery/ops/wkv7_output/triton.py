"""Norm, bonus and gate of RWKV-7's recurrence output in Triton: one pass forward, one backward that computes again."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rookery.ops.triton import PROGRAM, elementwise_why_not, power_of_two


def why_not(
    *,
    y: Tensor,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    r_k: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
) -> str | None:
    return elementwise_why_not(y, r, k, v, gate, parameters=(r_k, weight, bias))


def wkv7_output(
    *,
    y: Float[Tensor, "b t h n"],
    r: Float[Tensor, "b t h n"],
    k: Float[Tensor, "b t h n"],
    v: Float[Tensor, "b t h n"],
    gate: Float[Tensor, "b t c"],
    r_k: Float[Tensor, "h n"],
    weight: Float[Tensor, " c"],
    bias: Float[Tensor, " c"],
    eps: float,
) -> Float[Tensor, "b t c"]:
    """As the reference, with arithmetic in float32."""
    return forward(y, r, k, v, gate, r_k, weight, bias, eps)


@torch.library.custom_op("rookery::wkv7_output_triton", mutates_args=())
def forward(
    y: Tensor,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    r_k: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
) -> Tensor:
    from rookery.ops.wkv7_output.triton_kernels import finish

    inputs = [x.contiguous() for x in (y, r, k, v, gate, r_k, weight, bias)]
    out = torch.empty_like(inputs[4])
    if y.numel():
        settings = _settings(y, eps)
        with torch.cuda.device_of(y):
            finish[(_blocks(settings) * settings["heads"],)](*inputs, out, **settings)
    return out


@torch.library.custom_op("rookery::wkv7_output_triton_backward", mutates_args=())
def backward(
    y: Tensor,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    r_k: Tensor,
    weight: Tensor,
    bias: Tensor,
    grad_out: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    from rookery.ops.wkv7_output.triton_kernels import finish_backward

    inputs = [x.contiguous() for x in (y, r, k, v, gate, r_k, weight, bias)]
    grads = [torch.empty_like(x) for x in inputs[:5]]
    settings = _settings(y, eps)
    parts = y.new_zeros(_blocks(settings), 3, *r_k.shape, dtype=torch.float32)
    if y.numel():
        with torch.cuda.device_of(y):
            tensors = *inputs, grad_out.contiguous(), *grads, parts
            finish_backward[(parts.shape[0] * settings["heads"],)](*tensors, **settings)
    of_parameters = zip(parts.sum(dim=0), (r_k, weight, bias), strict=True)
    return *grads, *(grad.reshape(x.shape).to(x.dtype, copy=True) for grad, x in of_parameters)


def _settings(y: Tensor, eps: float) -> dict[str, Any]:
    batch, time, heads, head_dim = y.shape
    block = power_of_two(head_dim)
    return {
        "tokens": batch * time,
        "heads": heads,
        "eps": eps,
        "SIZE": head_dim,
        "BLOCK": block,
        "TOKENS": max(1, PROGRAM // block),
    }


def _blocks(settings: dict[str, Any]) -> int:
    return -(-settings["tokens"] // settings["TOKENS"])


@forward.register_fake
def _(
    y: Tensor,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    r_k: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
) -> Tensor:
    return gate.new_empty(gate.shape)


@backward.register_fake
def _(*tensors_and_eps: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in tensors_and_eps[:8])


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _gradient(ctx: Any, grad_out: Tensor) -> tuple:
    return *backward(*ctx.saved_tensors, grad_out, ctx.eps), None


forward.register_autograd(_gradient, setup_context=_save)
