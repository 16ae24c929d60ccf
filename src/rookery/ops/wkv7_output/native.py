"""Norm, bonus and gate of RWKV-7's recurrence output on the CPU: one pass forward, one backward that computes again."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rookery.ops.dispatch import native_module
from rookery.ops.native import addresses, elementwise_why_not, settings


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
    isa: str = "",
) -> Float[Tensor, "b t c"]:
    """As the reference, with arithmetic in float32. `isa` forces an instruction set, "" takes the best one."""
    parameters = (p.to(torch.float32) for p in (r_k, weight, bias))
    return forward(y, r, k, v, gate, *parameters, eps, isa)


@torch.library.custom_op("rookery::wkv7_output", mutates_args=())
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
    isa: str,
) -> Tensor:
    inputs = _named(y, r, k, v, gate, r_k, weight, bias)
    out = torch.empty_like(inputs["gate"])
    native_module().wkv7_output_forward(
        **addresses(**inputs, out=out), eps=eps, **_sizes(inputs["y"]), **settings(y, isa)
    )
    return out


@torch.library.custom_op("rookery::wkv7_output_backward", mutates_args=())
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
    isa: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = _named(y, r, k, v, gate, r_k, weight, bias)
    grads = {f"grad_{name}": torch.empty_like(inputs[name]) for name in ("y", "r", "k", "v", "gate")}
    grads["grad_parameters"] = r_k.new_empty(3, weight.shape[0])
    grad_out = grad_out.contiguous()
    native_module().wkv7_output_backward(
        **addresses(**inputs, grad_out=grad_out, **grads), eps=eps, **_sizes(y), **settings(y, isa)
    )
    return tuple(grads.values())


def _named(*inputs: Tensor) -> dict[str, Tensor]:
    names = ("y", "r", "k", "v", "gate", "r_k", "weight", "bias")
    return {name: x.contiguous() for name, x in zip(names, inputs, strict=True)}


def _sizes(y: Tensor) -> dict[str, int]:
    batch, time, heads, head_dim = y.shape
    return {"tokens": batch * time, "heads": heads, "head_dim": head_dim}


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
    isa: str,
) -> Tensor:
    return gate.new_empty(gate.shape)


@backward.register_fake
def _(
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
    isa: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    grads = [x.new_empty(x.shape) for x in (y, r, k, v, gate)]
    return *grads, r_k.new_empty(3, weight.shape[0])


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.eps, ctx.isa = inputs
    ctx.save_for_backward(*tensors)


def _gradient(ctx: Any, grad_out: Tensor) -> tuple:
    *grads, (r_k, weight, bias) = backward(*ctx.saved_tensors, grad_out, ctx.eps, ctx.isa)
    return *grads, r_k.view(grads[0].shape[2:]), weight, bias, None, None


forward.register_autograd(_gradient, setup_context=_save)
