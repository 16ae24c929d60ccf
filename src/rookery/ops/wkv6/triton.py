"""WKV-6 in Triton, for CUDA devices: all chunks side by side, but for a sum that runs over their states.

The equations are those of chunked.py, twice: chunks of 64 tokens, whose states are kept, and blocks of 16 in them.

1. `chunk_sums`: what each chunk adds to the state, P = K̂ᵀ V, and the sum Γ of its log_w.
2. `carry`: S = diag(e^Γ) S + P from chunk to chunk, element by element.
3. `output`: for each block the state before it, from that before the chunk, and Y = A V + R̃ S0.

Backward has the same three parts, from the last chunk to the first. In a block every exponent is a sum of log_w between
two tokens, so none is above 0, and no decay is too strong. The weights A are taken token by token, with their decays as
products; the rest are products of matrices, in the inputs' precision. With D_ti as in chunked.py, A' = dY Vᵀ,
dR^S = (dY S0) e^(D_t0), dK^S = (V dS1ᵀ) e^(D_(M+1)i):

    dlog_w_s = Σ_{i<s<t} r_t A'_ti k_i e^(D_ti) + Σ_{t>s} r_t dR^S_t + Σ_{i<s} k_i dK^S_i + e^Γ colsum(S0 dS1)
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rookery.ops.dispatch import triton_why_not
from rookery.ops.triton import DTYPES, check_documents, chunk_table, power_of_two

LARGEST = 128
"""Channels of a head, keys or values; beyond, the state's tile does not fit on a multiprocessor."""
CHUNK = 64
"""Tokens between two states that are kept."""
BLOCK = 16
"""Tokens of a block, SUB of the kernels."""


def why_not(*, r, log_w, k, v, u, state, cu_seqlens=None) -> str | None:
    """Reason that this call cannot run here, or None."""
    if reason := triton_why_not(r, log_w, k, v, u, dtypes=DTYPES):
        return reason
    if reason := triton_why_not(state, dtypes=(torch.float32,)):
        return reason
    if len(found := sorted({str(x.dtype).removeprefix("torch.") for x in (r, k, v)})) > 1:
        return f"it takes r, k and v of one dtype, these have {' and '.join(found)}"
    if max(state.shape[2:]) > LARGEST:
        return f"value and key sizes are at most {LARGEST}, these are {state.shape[2]} and {state.shape[3]}"
    return None


def wkv6(
    *,
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `rookery.ops.wkv6.wkv6`. `cu_seqlens` on the GPU is believed: looking at it would wait for the GPU."""
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in (r, log_w, k, v, u, state))
    if r.shape[1] == 1 and cu_seqlens is None and not keep:
        return _step(r, log_w, k, v, u, state)
    return _forward(r, log_w, k, v, u, state, cu_seqlens, keep)[:2]


class _Plan(NamedTuple):
    """How a call is cut into chunks and what every kernel is told of it."""

    chunks: tuple[int]
    """A grid with one program for every chunk of every head."""
    blocks: tuple[int]
    """A grid with one program for every block of every head."""
    table: Tensor
    """[chunks, 2] first token and end of every chunk, of packed rows only."""
    slots_of_row: Tensor
    """[rows + 1] first chunk of every document, of packed rows only."""
    sizes: dict[str, Any]
    settings: dict[str, Any]
    """The sizes, and how to multiply."""


def _plan(r: Tensor, state: Tensor, cu_seqlens: Tensor | None) -> _Plan:
    import triton.language as tl

    _, heads, value, key = state.shape
    slots = _slots(r, state, cu_seqlens)
    table = slots_of_row = state
    if cu_seqlens is not None:
        table, slots_of_row = chunk_table(cu_seqlens.to(r.device), CHUNK, slots, r.shape[1])
    sizes = {
        "time": r.shape[1],
        "heads": heads,
        "KEY": key,
        "VALUE": value,
        "BLOCK_K": max(16, power_of_two(key)),
        "BLOCK_V": max(16, power_of_two(value)),
        "CHUNK": CHUNK,
        "PACKED": cu_seqlens is not None,
    }
    multiply = {
        "DTYPE": tl.bfloat16 if r.dtype == torch.bfloat16 else tl.float32,
        "PRECISION": "ieee" if r.dtype == torch.float32 else "tf32",
        "num_warps": 4 if max(key, value) <= 64 else 8,
    }
    grids = (slots * heads,), (slots * heads * (CHUNK // BLOCK),)
    return _Plan(*grids, table, slots_of_row, sizes, sizes | multiply)


def _slots(r: Tensor, state: Tensor, cu_seqlens: Tensor | None) -> int:
    """Chunks there can be; in packed rows, where every document starts one of its own, fewer may be used."""
    batch, tokens = r.shape[:2]
    return batch * -(-tokens // CHUNK) if cu_seqlens is None else tokens // CHUNK + state.shape[0]


def _carry(plan: _Plan, begin: Tensor, decay: Tensor, states: Tensor, end: Tensor, reverse: bool) -> None:
    from rookery.ops.wkv6.triton_kernels import carry

    # 1024 numbers of the state a program: the chunks come one after the other, so there must be many programs
    block = max(1, min(1024 // plan.sizes["BLOCK_K"], plan.sizes["BLOCK_V"]))
    grid = (begin.shape[0] * begin.shape[1] * -(-plan.sizes["VALUE"] // block),)
    sizes = plan.sizes | {"BLOCK_V": block}
    carry[grid](begin, decay, plan.table, plan.slots_of_row, states, end, REVERSE=reverse, **sizes, num_warps=4)


@torch.library.custom_op("rookery::wkv6_triton_forward", mutates_args=())
def _forward(
    r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor, cu_seqlens: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Outputs and last state; with `keep` the chunks' states and decays that the backward pass needs (else empty)."""
    from rookery.ops.wkv6.triton_kernels import chunk_sums, output

    check_documents(r, cu_seqlens)
    r, log_w, k, v, u, state = (x.contiguous() for x in (r, log_w, k, v, u, state))
    if not r.numel() or not v.numel():
        y, _, *kept = _empty_results(r, v, state, cu_seqlens, keep)
        return y.zero_(), state.clone(), *kept
    y, last_state, states, decay = _empty_results(r, v, state, cu_seqlens, True)
    with torch.cuda.device_of(r):
        plan = _plan(r, state, cu_seqlens)
        chunk_sums[plan.chunks](k, log_w, v, plan.table, states, decay, REVERSE=False, **plan.settings)
        _carry(plan, state, decay, states, last_state, reverse=False)
        output[plan.blocks](r, log_w, k, v, u, states, plan.table, y, **plan.settings)
    return y, last_state, *((states, decay) if keep else (x.new_empty(0, *x.shape[1:]) for x in (states, decay)))


@_forward.register_fake
def _(r, _log_w, _k, v, _u, state, cu_seqlens, keep):
    return _empty_results(r, v, state, cu_seqlens, keep)


@torch.library.custom_op("rookery::wkv6_triton_backward", mutates_args=())
def _backward(
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None,
    states: Tensor,
    decay: Tensor,
    grad_y: Tensor | None,
    grad_last_state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of r, log_w, k, v, u and the initial state, each in the dtype of its tensor."""
    from rookery.ops.wkv6.triton_kernels import chunk_sums, gradients

    r, log_w, k, v, u = (x.contiguous() for x in (r, log_w, k, v, u))
    *grads, grad_state = _empty_like(r, log_w, k, v, state)
    grad_y = torch.zeros_like(v) if grad_y is None else grad_y.contiguous()
    grad_last_state = torch.zeros_like(grad_state) if grad_last_state is None else grad_last_state.contiguous()
    if not r.numel() or not v.numel():
        return *(x.zero_() for x in grads), torch.zeros_like(u), grad_last_state.clone()
    with torch.cuda.device_of(r):
        plan = _plan(r, state, cu_seqlens)
        grad_states, again = torch.empty_like(states), torch.empty_like(decay)
        chunk_sums[plan.chunks](r, log_w, grad_y, plan.table, grad_states, again, REVERSE=True, **plan.settings)
        _carry(plan, grad_last_state, decay, grad_states, grad_state, reverse=True)
        # zeros for blocks without a token
        parts = state.new_zeros(plan.blocks[0] // r.shape[2], *u.shape)
        found = grad_y, states, grad_states, plan.table
        # its tiles do not fit into the registers of four warps
        settings = plan.settings | {"num_warps": 8}
        gradients[plan.blocks](r, log_w, k, v, u, *found, *grads, parts, **settings)
    return *grads, parts.sum(0).to(u.dtype), grad_state


@_backward.register_fake
def _(*tensors):
    return _empty_like(*tensors[:6])


@torch.library.custom_op("rookery::wkv6_triton_step", mutates_args=())
def _step(r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token of every row, without gradients."""
    from rookery.ops.wkv6.triton_kernels import step

    r, log_w, k, v, u, state = (x.contiguous() for x in (r, log_w, k, v, u, state))
    y, next_state = results = _empty_like(v, state)
    if not state.numel():
        return y.zero_(), next_state
    rows, heads, value, key = state.shape
    block_k = max(16, power_of_two(key))
    # 2048 numbers of the state a program: 16 a thread, loaded at once
    block_v = min(max(1, 2048 // block_k), power_of_two(value))
    grid = (rows * heads * -(-value // block_v),)
    sizes = {"KEY": key, "VALUE": value, "BLOCK_K": block_k, "BLOCK_V": block_v}
    with torch.cuda.device_of(r):
        step[grid](r, log_w, k, v, u, state, y, next_state, heads, **sizes, num_warps=4)
    return results


@_step.register_fake
def _(_r, _log_w, _k, v, _u, state):
    return _empty_like(v, state)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, _keep = inputs
    ctx.save_for_backward(*tensors, *output[2:])
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad_y, grad_last_state, *_kept):
    return *_backward(*ctx.saved_tensors, grad_y, grad_last_state), None, None


_forward.register_autograd(_differentiate, setup_context=_setup_context)


def _empty_results(
    r: Tensor, v: Tensor, state: Tensor, cu_seqlens: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _, heads, value, key = state.shape
    slots = _slots(r, state, cu_seqlens) if keep else 0
    return *_empty_like(v, state), state.new_empty(slots, heads, value, key), state.new_empty(slots, heads, key)


def _empty_like(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors)
