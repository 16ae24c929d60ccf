"""Bi-WKV in Triton, for CUDA devices: channel by channel, all chunks of 32 tokens side by side, in both directions.

1. `chunk_sums`: Σ e^k v and Σ e^k over each chunk's own tokens, seen from the token after it, and from that before it.
2. `carry`: the same over all tokens before (after) a chunk, from chunk to chunk.
3. `token_sums`: over all before each token; `output`: those after each token, and the averages.

Backward, what the outputs after a token say to its key and value is a sum of the same form, from the end, and so is
what those before it say. With A, B the sums before a token, A', B' after it, g = dy / denominator, p the token's own
share of it, and dA, dB summed over the outputs after the token, dA', dB' before it:

    dv = p dy + e^k (dA + dA')        dk = p dy (v − y) + e^k ((dA + dA') v + dB + dB')        dμ = Σ p dy (v − y)
    dω = −Σ e^−ω (A dA + B dB + A' dA' + B' dB')
"""

from typing import Any

import torch
from torch import Tensor

from rookery.ops.dispatch import triton_why_not
from rookery.ops.triton import DTYPES, power_of_two

CHUNK = 32
"""Tokens that a program reads one after the other."""
CHANNELS = 128
"""Channels of a program, one a thread."""


def why_not(*, omega: Tensor, mu: Tensor, k: Tensor, v: Tensor, compat: str = "exact") -> str | None:
    """Reason that this call cannot run here, or None."""
    if compat != "exact":
        return f"it computes the exact form, not {compat!r}"
    return triton_why_not(omega, mu, k, v, dtypes=DTYPES)


def bi_wkv(*, omega: Tensor, mu: Tensor, k: Tensor, v: Tensor, compat: str = "exact") -> Tensor:
    """As `rookery.ops.bi_wkv.bi_wkv`."""
    return _forward(omega, mu, k, v)


def _settings(k: Tensor) -> tuple[tuple[int], tuple[int], dict[str, Any]]:
    """A grid with a program for every chunk, one with a program for every row, and what kernels are told."""
    batch, tokens, width = k.shape
    block = min(CHANNELS, power_of_two(width))
    blocks, chunks = -(-width // block), -(-tokens // CHUNK)
    settings = {"time": tokens, "width": width, "CHUNK": CHUNK, "BLOCK": block, "num_warps": 4}
    return (batch * chunks * blocks,), (batch * blocks,), settings


def _seeds(omega: Tensor, k: Tensor, v: Tensor, *, reverse: bool) -> Tensor:
    """The sums over all tokens before each chunk [chunks, 3, c]; with `reverse` after it."""
    from rookery.ops.bi_wkv.triton_kernels import carry, chunk_sums

    chunks, rows, settings = _settings(k)
    states = omega.new_empty(k.shape[0] * -(-k.shape[1] // CHUNK), 3, k.shape[2], dtype=torch.float32)
    chunk_sums[chunks](omega, k, v, states, REVERSE=reverse, **settings)
    carry[rows](omega, states, REVERSE=reverse, **settings)
    return states


def _before_tokens(omega: Tensor, k: Tensor, v: Tensor, states: Tensor, *, reverse: bool) -> Tensor:
    """The sums over all tokens before each token [b, t, 3, c]; with `reverse` after it."""
    from rookery.ops.bi_wkv.triton_kernels import token_sums

    chunks, _, settings = _settings(k)
    sums = states.new_empty(*k.shape[:2], 3, k.shape[2])
    token_sums[chunks](omega, k, v, states, sums, REVERSE=reverse, **settings)
    return sums


@torch.library.custom_op("rookery::bi_wkv_triton", mutates_args=())
def _forward(omega: Tensor, mu: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from rookery.ops.bi_wkv.triton_kernels import output

    omega, mu, k, v = (x.contiguous() for x in (omega, mu, k, v))
    (y,) = _empty_like(v)
    if not k.numel():
        return y
    with torch.cuda.device_of(k):
        chunks, _, settings = _settings(k)
        past = _before_tokens(omega, k, v, _seeds(omega, k, v, reverse=False), reverse=False)
        output[chunks](omega, mu, k, v, past, _seeds(omega, k, v, reverse=True), y, **settings)
    return y


@_forward.register_fake
def _(_omega, _mu, _k, v):
    return _empty_like(v)[0]


@torch.library.custom_op("rookery::bi_wkv_triton_backward", mutates_args=())
def _backward(omega: Tensor, mu: Tensor, k: Tensor, v: Tensor, grad_y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from rookery.ops.bi_wkv.triton_kernels import carry, gradients, output_gradients

    omega, mu, k, v, grad_y = (x.contiguous() for x in (omega, mu, k, v, grad_y))
    grad_k, grad_v = _empty_like(k, v)
    if not k.numel():
        return torch.zeros_like(omega), torch.zeros_like(mu), grad_k, grad_v
    with torch.cuda.device_of(k):
        chunks, rows, settings = _settings(k)
        seeds = [_seeds(omega, k, v, reverse=reverse) for reverse in (False, True)]
        sums = [_before_tokens(omega, k, v, x, reverse=reverse) for x, reverse in zip(seeds, (False, True))]
        call = omega, mu, k, v, *sums, grad_y
        # gradients of omega and mu get a part for each chunk; the two directions meet in part_k and part_v
        of_omega, of_mu = (seeds[0].new_empty(seeds[0].shape[0], k.shape[2]) for _ in range(2))
        part_k, part_v = (seeds[0].new_empty(k.shape) for _ in range(2))
        found = of_omega, of_mu, grad_k, grad_v, part_k, part_v
        grads = torch.empty_like(seeds[0])
        for reverse in (True, False):
            output_gradients[chunks](*call, grads, REVERSE=reverse, **settings)
            carry[rows](omega, grads, REVERSE=reverse, **settings)
            gradients[chunks](*call, grads, *found, REVERSE=reverse, **settings)
    return of_omega.sum(0).to(omega.dtype), of_mu.sum(0).to(mu.dtype), grad_k, grad_v


@_backward.register_fake
def _(omega, mu, k, v, _grad_y):
    return _empty_like(omega, mu, k, v)


_forward.register_autograd(
    lambda ctx, grad: _backward(*ctx.saved_tensors, grad),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def _empty_like(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors)
