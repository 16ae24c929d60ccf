"""WKV-4 in Triton, for CUDA devices: channel by channel, all chunks of 32 tokens side by side.

1. `chunk_sums`: the sums Σ e^k v and Σ e^k over each chunk's own tokens.
2. `carry`: the sums over all tokens before a chunk, from chunk to chunk.
3. `output`: the averages, token by token, from the sums before the chunk.

Backward runs the same way from the last token to the first. With the sums A, B before a token, E = e^(u + k),
y = (A + E v) / (B + E) and g = dy / (B + E), the gradients of the sums are sums again, and so are all others:

    dA_t = e^log_w dA_{t+1} + g_t        dB_t = e^log_w dB_{t+1} − g_t y_t
    dv = E g + e^k dA_{t+1}              dk = E g (v − y) + e^k (dA_{t+1} v + dB_{t+1})
    du = Σ E g (v − y)                   dlog_w = Σ e^log_w (A dA_{t+1} + B dB_{t+1})
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rookery.ops.dispatch import triton_why_not
from rookery.ops.triton import DTYPES, check_documents, chunk_table, power_of_two

CHUNK = 32
"""Tokens that a program reads one after the other."""
CHANNELS = 128
"""Channels of a program, one a thread."""


def why_not(*, log_w, u, k, v, state, cu_seqlens=None) -> str | None:
    """Reason that this call cannot run here, or None."""
    if reason := triton_why_not(log_w, u, k, v, dtypes=DTYPES):
        return reason
    return triton_why_not(state, dtypes=(torch.float32,))


def wkv4(
    *, log_w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: Tensor, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `rookery.ops.wkv4.wkv4`. `cu_seqlens` on the GPU is believed: looking at it would wait for the GPU."""
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in (log_w, u, k, v, state))
    return _forward(log_w, u, k, v, state, cu_seqlens, keep)[:2]


class _Plan(NamedTuple):
    """How a call is cut into chunks and what every kernel is told of it."""

    chunks: tuple[int]
    """A grid with one program for every chunk of every block of channels."""
    rows: tuple[int]
    """A grid with one program for every row of the state and every block of channels."""
    table: Tensor
    """[chunks, 2] first token and end of every chunk, of packed rows only."""
    slots_of_row: Tensor
    """[rows + 1] first chunk of every document, of packed rows only."""
    settings: dict[str, Any]


def _plan(k: Tensor, state: Tensor, cu_seqlens: Tensor | None) -> _Plan:
    width = k.shape[2]
    slots = _slots(k, state, cu_seqlens)
    table = slots_of_row = state
    if cu_seqlens is not None:
        table, slots_of_row = chunk_table(cu_seqlens.to(k.device), CHUNK, slots, k.shape[1])
    block = min(CHANNELS, power_of_two(width))
    blocks = -(-width // block)
    settings = {"time": k.shape[1], "width": width, "CHUNK": CHUNK, "BLOCK": block, "PACKED": cu_seqlens is not None}
    return _Plan((slots * blocks,), (state.shape[0] * blocks,), table, slots_of_row, settings | {"num_warps": 4})


def _slots(k: Tensor, state: Tensor, cu_seqlens: Tensor | None) -> int:
    """Chunks there can be; in packed rows, where every document starts one of its own, fewer may be used."""
    batch, tokens = k.shape[:2]
    return batch * -(-tokens // CHUNK) if cu_seqlens is None else tokens // CHUNK + state.shape[0]


@torch.library.custom_op("rookery::wkv4_triton_forward", mutates_args=())
def _forward(
    log_w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: Tensor, cu_seqlens: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs and last state; with `keep` the sums before each chunk, which the backward pass needs (else empty)."""
    from rookery.ops.wkv4.triton_kernels import carry, chunk_sums, output

    check_documents(k, cu_seqlens)
    log_w, u, k, v, state = (x.contiguous() for x in (log_w, u, k, v, state))
    if not k.numel():
        y, _, kept = _empty_results(k, v, state, cu_seqlens, keep)
        return y.zero_(), state.clone(), kept
    y, last_state, states = _empty_results(k, v, state, cu_seqlens, True)
    with torch.cuda.device_of(k):
        plan = _plan(k, state, cu_seqlens)
        chunk_sums[plan.chunks](log_w, k, v, plan.table, states, **plan.settings)
        carry[plan.rows](
            state, log_w, plan.table, plan.slots_of_row, states, last_state, REVERSE=False, **plan.settings
        )
        output[plan.chunks](log_w, u, k, v, states, plan.table, y, **plan.settings)
    return y, last_state, states if keep else states.new_empty(0, *states.shape[1:])


@_forward.register_fake
def _(_log_w, _u, k, v, state, cu_seqlens, keep):
    return _empty_results(k, v, state, cu_seqlens, keep)


@torch.library.custom_op("rookery::wkv4_triton_backward", mutates_args=())
def _backward(
    log_w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None,
    last_state: Tensor,
    states: Tensor,
    grad_y: Tensor | None,
    grad_last_state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of log_w, u, k, v and the initial state, each in the dtype of its tensor."""
    from rookery.ops.wkv4.triton_kernels import carry, chunk_gradients, gradients

    log_w, u, k, v = (x.contiguous() for x in (log_w, u, k, v))
    grad_log_w, grad_u, grad_k, grad_v, grad_state = _empty_like(log_w, u, k, v, state)
    grad_y = torch.zeros_like(v) if grad_y is None else grad_y.contiguous()
    # of the true sums, by e^−top; the gradients with respect to top itself are none
    begin = torch.zeros_like(grad_state) if grad_last_state is None else grad_last_state.clone()
    begin[:, 2] = -last_state[:, 2]
    if not k.numel():
        begin[:, 2] = 0
        return *(x.zero_() for x in (grad_log_w, grad_u, grad_k, grad_v)), begin
    with torch.cuda.device_of(k):
        plan = _plan(k, state, cu_seqlens)
        before, grad_states = state.new_empty(*k.shape[:2], 3, k.shape[2]), torch.empty_like(states)
        chunk_gradients[plan.chunks](
            log_w, u, k, v, grad_y, states, plan.table, before, grad_states, **plan.settings
        )  # fmt: skip
        carry[plan.rows](
            begin, log_w, plan.table, plan.slots_of_row, grad_states, grad_state, REVERSE=True, **plan.settings
        )
        # zeros for chunks without a token
        of_decay, of_bonus = (state.new_zeros(states.shape[0], k.shape[2]) for _ in range(2))
        found = grad_y, before, grad_states, plan.table
        gradients[plan.chunks](log_w, u, k, v, *found, of_decay, of_bonus, grad_k, grad_v, **plan.settings)
    grad_state[:, :2] *= (grad_state[:, 2:] + state[:, 2:]).exp()
    grad_state[:, 2] = 0
    return of_decay.sum(0).to(log_w.dtype), of_bonus.sum(0).to(u.dtype), grad_k, grad_v, grad_state


@_backward.register_fake
def _(*tensors):
    return _empty_like(*tensors[:5])


def _setup_context(ctx, inputs, output) -> None:
    *tensors, _keep = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad_y, grad_last_state, _states):
    return *_backward(*ctx.saved_tensors, grad_y, grad_last_state), None, None


_forward.register_autograd(_differentiate, setup_context=_setup_context)


def _empty_results(
    k: Tensor, v: Tensor, state: Tensor, cu_seqlens: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    slots = _slots(k, state, cu_seqlens) if keep else 0
    return *_empty_like(v, state), state.new_empty(slots, 3, k.shape[2])


def _empty_like(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors)
