"""The inputs of RWKV-7's recurrence on the CPU: one pass forward; backward, one pass that computes all again."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rookery.ops.dispatch import native_module
from rookery.ops.native import addresses, elementwise_why_not, settings


def why_not(
    *,
    k: Tensor,
    decay_logit: Tensor,
    rate_logit: Tensor,
    k_k: Tensor,
    k_a: Tensor,
    head_dim: int,
) -> str | None:
    return elementwise_why_not(k, decay_logit, rate_logit, parameters=(k_k, k_a))


def wkv7_inputs(
    *,
    k: Float[Tensor, "b t c"],
    decay_logit: Float[Tensor, "b t c"],
    rate_logit: Float[Tensor, "b t c"],
    k_k: Float[Tensor, " c"],
    k_a: Float[Tensor, " c"],
    head_dim: int,
    isa: str = "",
) -> tuple[Float[Tensor, "b t h n"], Float[Tensor, "b t h n"], Float[Tensor, "b t h n"], Float[Tensor, "b t h n"]]:
    """As the reference, with arithmetic in float32. `isa` forces an instruction set, "" takes the best one."""
    return forward(k, decay_logit, rate_logit, k_k.to(torch.float32), k_a.to(torch.float32), head_dim, isa)


Four = tuple[Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("rookery::wkv7_inputs", mutates_args=())
def forward(
    k: Tensor, decay_logit: Tensor, rate_logit: Tensor, k_k: Tensor, k_a: Tensor, head_dim: int, isa: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    k, decay_logit, rate_logit = k.contiguous(), decay_logit.contiguous(), rate_logit.contiguous()
    k_k, k_a = k_k.contiguous(), k_a.contiguous()
    log_w, k_out, a, b = results = _results(k, head_dim)
    native_module().wkv7_inputs_forward(
        **addresses(k=k, decay_logit=decay_logit, rate_logit=rate_logit, k_k=k_k, k_a=k_a),
        **addresses(log_w=log_w, k_out=k_out, a=a, b=b),
        **_sizes(k, head_dim),
        **settings(k, isa),
    )
    return results


@torch.library.custom_op("rookery::wkv7_inputs_backward", mutates_args=())
def backward(
    k: Tensor,
    decay_logit: Tensor,
    rate_logit: Tensor,
    k_k: Tensor,
    k_a: Tensor,
    grad_log_w: Tensor,
    grad_k_out: Tensor,
    grad_a: Tensor,
    grad_b: Tensor,
    head_dim: int,
    isa: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    k, decay_logit, rate_logit = k.contiguous(), decay_logit.contiguous(), rate_logit.contiguous()
    k_k, k_a = k_k.contiguous(), k_a.contiguous()
    grad_log_w, grad_k_out = grad_log_w.contiguous(), grad_k_out.contiguous()
    grad_a, grad_b = grad_a.contiguous(), grad_b.contiguous()
    grad_k, grad_decay_logit, grad_rate_logit = (torch.empty_like(k) for _ in range(3))
    grad_parameters = k_k.new_empty(2, k_k.shape[0])
    native_module().wkv7_inputs_backward(
        **addresses(k=k, decay_logit=decay_logit, rate_logit=rate_logit, k_k=k_k, k_a=k_a),
        **addresses(grad_log_w=grad_log_w, grad_k_out=grad_k_out, grad_a=grad_a, grad_b=grad_b),
        **addresses(grad_k=grad_k, grad_decay_logit=grad_decay_logit, grad_rate_logit=grad_rate_logit),
        **addresses(grad_parameters=grad_parameters),
        **_sizes(k, head_dim),
        **settings(k, isa),
    )
    return grad_k, grad_decay_logit, grad_rate_logit, grad_parameters


def _results(k: Tensor, head_dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Room for log_w, k, a and b."""
    shape = (*k.shape[:-1], k.shape[-1] // head_dim, head_dim)
    return k.new_empty(shape, dtype=torch.float32), k.new_empty(shape), k.new_empty(shape), k.new_empty(shape)


def _sizes(k: Tensor, head_dim: int) -> dict[str, int]:
    batch, time, channels = k.shape
    return {"tokens": batch * time, "heads": channels // head_dim, "head_dim": head_dim}


@forward.register_fake
def _(k: Tensor, decay_logit: Tensor, rate_logit: Tensor, k_k: Tensor, k_a: Tensor, head_dim: int, isa: str) -> Four:
    return _results(k, head_dim)


@backward.register_fake
def _(
    k: Tensor,
    decay_logit: Tensor,
    rate_logit: Tensor,
    k_k: Tensor,
    k_a: Tensor,
    grad_log_w: Tensor,
    grad_k_out: Tensor,
    grad_a: Tensor,
    grad_b: Tensor,
    head_dim: int,
    isa: str,
) -> Four:
    like = k, decay_logit, rate_logit
    grad_k, grad_decay_logit, grad_rate_logit = (x.new_empty(x.shape) for x in like)
    return grad_k, grad_decay_logit, grad_rate_logit, k_k.new_empty(2, k_k.shape[0])


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.head_dim, ctx.isa = inputs
    ctx.save_for_backward(*tensors)


def _gradient(ctx: Any, *grads: Tensor) -> tuple:
    *inputs, (k_k, k_a) = backward(*ctx.saved_tensors, *grads, ctx.head_dim, ctx.isa)
    return *inputs, k_k, k_a, None, None


forward.register_autograd(_gradient, setup_context=_save)
