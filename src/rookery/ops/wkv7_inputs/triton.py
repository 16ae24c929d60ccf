"""The inputs of RWKV-7's recurrence in Triton: one pass forward; backward, one pass that computes all again."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rookery.ops.triton import PROGRAM, elementwise_why_not, power_of_two
from rookery.ops.wkv7_inputs.reference import LOG_DECAY_SCALE, NORM_FLOOR

Four = tuple[Tensor, Tensor, Tensor, Tensor]


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
) -> tuple[Float[Tensor, "b t h n"], Float[Tensor, "b t h n"], Float[Tensor, "b t h n"], Float[Tensor, "b t h n"]]:
    """As the reference, with arithmetic in float32."""
    return forward(k, decay_logit, rate_logit, k_k, k_a, head_dim)


@torch.library.custom_op("rookery::wkv7_inputs_triton", mutates_args=())
def forward(
    k: Tensor, decay_logit: Tensor, rate_logit: Tensor, k_k: Tensor, k_a: Tensor, head_dim: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from rookery.ops.wkv7_inputs.triton_kernels import prepare

    inputs = [x.contiguous() for x in (k, decay_logit, rate_logit, k_k, k_a)]
    results = _results(k, head_dim)
    if k.numel():
        settings = _settings(k, head_dim)
        with torch.cuda.device_of(k):
            prepare[(_blocks(settings) * settings["heads"],)](*inputs, *results, **settings)
    return results


@torch.library.custom_op("rookery::wkv7_inputs_triton_backward", mutates_args=())
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from rookery.ops.wkv7_inputs.triton_kernels import prepare_backward

    inputs = [x.contiguous() for x in (k, decay_logit, rate_logit, k_k, k_a)]
    arrived = [x.contiguous() for x in (grad_log_w, grad_k_out, grad_a, grad_b)]
    grads = [torch.empty_like(x) for x in inputs[:3]]
    settings = _settings(k, head_dim)
    parts = k.new_zeros(_blocks(settings), 2, k.shape[-1], dtype=torch.float32)
    if k.numel():
        with torch.cuda.device_of(k):
            prepare_backward[(parts.shape[0] * settings["heads"],)](*inputs, *arrived, *grads, parts, **settings)
    grad_k_k, grad_k_a = parts.sum(dim=0)
    return *grads, grad_k_k.to(k_k.dtype), grad_k_a.to(k_a.dtype, copy=True)


def _settings(k: Tensor, head_dim: int) -> dict[str, Any]:
    batch, time, channels = k.shape
    block = power_of_two(head_dim)
    return {
        "tokens": batch * time,
        "heads": channels // head_dim,
        "scale": LOG_DECAY_SCALE,
        "floor": NORM_FLOOR,
        "SIZE": head_dim,
        "BLOCK": block,
        "TOKENS": max(1, PROGRAM // block),
    }


def _blocks(settings: dict[str, Any]) -> int:
    return -(-settings["tokens"] // settings["TOKENS"])


def _results(k: Tensor, head_dim: int) -> Four:
    """Room for log_w, k, a and b."""
    shape = (*k.shape[:-1], k.shape[-1] // head_dim, head_dim)
    return k.new_empty(shape, dtype=torch.float32), k.new_empty(shape), k.new_empty(shape), k.new_empty(shape)


@forward.register_fake
def _(k: Tensor, decay_logit: Tensor, rate_logit: Tensor, k_k: Tensor, k_a: Tensor, head_dim: int) -> Four:
    return _results(k, head_dim)


@backward.register_fake
def _(*tensors_and_head_dim: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in tensors_and_head_dim[:5])


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.head_dim = inputs
    ctx.save_for_backward(*tensors)


def _gradient(ctx: Any, *grads: Tensor) -> tuple:
    return *backward(*ctx.saved_tensors, *grads, ctx.head_dim), None


forward.register_autograd(_gradient, setup_context=_save)
