"""WKV-7 in Triton, for CUDA devices: chunk by chunk, so that nearly all work is products of matrices.

In a chunk of M tokens, rows being tokens, with G the inclusive and E the exclusive sum of log_w and Γ = e^(G_M):

    R̃ = R e^G    Ã = A e^E    K̄ = K e^(−G)    B̄ = B e^(−G)    K̂ = K e^(G_M−G)    B̂ = B e^(G_M−G)
    A_ab = below(Ã B̄ᵀ)   A_ak = below(Ã K̄ᵀ)   A_rb = lower(R̃ B̄ᵀ)   A_rk = lower(R̃ K̄ᵀ)   T = (I − A_ab)⁻¹
    U = T (Ã S0ᵀ + A_ak V)      row t is S_{t−1} a_t
    Y = R̃ S0ᵀ + A_rk V + A_rb U
    S1 = S0 diag(Γ) + Vᵀ K̂ + Uᵀ B̂

`prepare` computes what needs no state, all chunks side by side; `scan` carries the state from chunk to chunk;
`output` computes Y, again all chunks side by side. Backward has the same form, from the last chunk to the first:

    Z = Tᵀ (A_rbᵀ dY + B̂ dS1ᵀ)      dS0 = dS1 diag(Γ) + dYᵀ R̃ + Zᵀ Ã
    dV = A_rkᵀ dY + A_akᵀ Z + K̂ dS1ᵀ
    dA_rk = lower(dY Vᵀ)    dA_rb = lower(dY Uᵀ)    dA_ak = below(Z Vᵀ)    dA_ab = below(Z Uᵀ)
    dR = (dY S0 + dA_rk K̄ + dA_rb B̄) e^G               dA = (Z S0 + dA_ak K̄ + dA_ab B̄) e^E
    dK = (dA_rkᵀ R̃ + dA_akᵀ Ã) e^(−G) + V dS1 e^(G_M−G)   dB = (dA_rbᵀ R̃ + dA_abᵀ Ã) e^(−G) + U dS1 e^(G_M−G)
    dG = R dR − K dK − B dB     dE = A dA     dG_M += Σ_t (K K̂' + B B̂') + Γ colsum(dS1 S0)   ' the parts with dS1
    dlog_w = reversed cumulative sum of dG, and exclusively of dE

In the products of R̃, Ã with K̄, B̄ all exponents are counted from G_M/2: within ±20 for chunks of 64, so bfloat16 loses
no more than its rounding; the sum of log_w over a chunk must stay above −170. (arXiv 2406.06484 has the form without
decay.)
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rookery.ops.dispatch import triton_why_not
from rookery.ops.triton import check_documents, chunk_table

LARGEST = 128
"""Channels of a head, keys or values; beyond, the state's tile does not fit on a multiprocessor."""
ENOUGH_PROGRAMS = 128
"""Programs that fill a GPU with nothing to spare; with fewer, a head's values are shared out more finely."""


def why_not(*, r, log_w, k, v, a, b, state, cu_seqlens=None) -> str | None:
    """Reason that this call cannot run here, or None."""
    if reason := triton_why_not(r, log_w, k, v, a, b, dtypes=(torch.float32, torch.bfloat16, torch.float16)):
        return reason
    if reason := triton_why_not(state, dtypes=(torch.float32,)):
        return reason
    if len(found := sorted({str(x.dtype).removeprefix("torch.") for x in (r, k, v, a, b)})) > 1:
        return f"it takes r, k, v, a and b of one dtype, these have {' and '.join(found)}"
    if max(state.shape[2:]) > LARGEST:
        return f"value and key sizes are at most {LARGEST}, these are {state.shape[2]} and {state.shape[3]}"
    return None


def wkv7(
    *,
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `rookery.ops.wkv7.wkv7`. `cu_seqlens` on the GPU is believed: looking at it would wait for the GPU."""
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in (r, log_w, k, v, a, b, state))
    if r.shape[1] == 1 and cu_seqlens is None and not keep:
        return _step(r, log_w, k, v, a, b, state)
    log_w = log_w.float()  # two kernels add to its gradient
    return _forward(r, log_w, k, v, a, b, state, cu_seqlens, keep)[:2]


class _Plan(NamedTuple):
    """How a call is cut into chunks and what every kernel is told of it."""

    rows: int
    heads: int
    slots: int
    """Chunks there can be; in packed rows fewer may be used."""
    table: Tensor
    """[slots, 2] first token and end of every chunk, of packed rows only."""
    slots_of_row: Tensor
    """[rows + 1] first slot of every document, of packed rows only."""
    kept: torch.dtype
    """Of what is stored between kernels."""
    settings: dict[str, Any]

    @property
    def chunks(self) -> tuple[int]:
        """A grid with one program for every chunk of every head."""
        return (self.slots * self.heads,)


def _plan(r: Tensor, state: Tensor, cu_seqlens: Tensor | None) -> _Plan:
    import triton
    import triton.language as tl

    narrow = r.dtype == torch.bfloat16
    rows, heads, value, key = state.shape
    chunk = _chunk(r)
    slots = _slots(r, state, cu_seqlens)
    table = slots_of_row = state
    if cu_seqlens is not None:
        table, slots_of_row = chunk_table(cu_seqlens.to(r.device), chunk, slots, r.shape[1])
    settings = {
        "time": r.shape[1],
        "heads": heads,
        "KEY": key,
        "VALUE": value,
        "BLOCK_K": max(16, triton.next_power_of_2(key)),
        "BLOCK_V": max(16, triton.next_power_of_2(value)),
        "CHUNK": chunk,
        "PACKED": cu_seqlens is not None,
        # float16 has too few exponents for e^±20
        "DTYPE": tl.bfloat16 if narrow else tl.float32,
        "PRECISION": "ieee" if r.dtype == torch.float32 else "tf32",
        "num_warps": 4 if narrow and max(key, value) <= 64 else 8,
    }
    return _Plan(rows, heads, slots, table, slots_of_row, torch.bfloat16 if narrow else torch.float32, settings)


def _chunk(r: Tensor) -> int:
    """Tokens of a chunk: Hopper multiplies 64 rows of bfloat16 at once; float32 would not fit into its registers."""
    return 64 if r.dtype == torch.bfloat16 else 16


def _slots(r: Tensor, state: Tensor, cu_seqlens: Tensor | None) -> int:
    batch, tokens = r.shape[:2]
    if cu_seqlens is None:
        return batch * -(-tokens // _chunk(r))
    # every document starts a chunk of its own
    return tokens // _chunk(r) + state.shape[0]


def _scan(plan: _Plan, begin: Tensor, *tensors: Tensor, states: Tensor, end: Tensor, reverse: bool) -> None:
    """Carries `begin` through all chunks: `tensors` are those of the kernel, from `direct` to `decay`."""
    from rookery.ops.wkv7.triton_forward import scan

    heads = plan.rows * plan.heads
    value, block = plan.settings["VALUE"], plan.settings["BLOCK_V"]
    while block > 16 and heads * -(-value // block) < ENOUGH_PROGRAMS:
        block //= 2
    scan[(heads * -(-value // block),)](
        begin,
        *tensors,
        plan.table,
        plan.slots_of_row,
        states,
        end,
        REVERSE=reverse,
        **plan.settings | {"BLOCK_V": block},
    )


@torch.library.custom_op("rookery::wkv7_triton_forward", mutates_args=())
def _forward(
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Outputs and last state; with `keep` the chunks' states, U and T that the backward pass needs (else empty)."""
    from rookery.ops.wkv7.triton_forward import output, prepare

    check_documents(r, cu_seqlens)
    r, log_w, k, v, a, b, state = (x.contiguous() for x in (r, log_w, k, v, a, b, state))
    if not r.numel() or not v.numel():
        y, _, *kept = _empty_results(r, v, state, cu_seqlens, keep)
        return y.zero_(), state.clone(), *kept
    y, last_state, states, removed, inverse = _empty_results(r, v, state, cu_seqlens, True)
    with torch.cuda.device_of(r):
        plan = _plan(r, state, cu_seqlens)
        reach, k_hat, b_hat = (torch.empty_like(k, dtype=plan.kept) for _ in range(3))
        decay = state.new_empty(plan.slots, plan.heads, k.shape[3])
        prepared = reach, removed, k_hat, b_hat, decay
        prepare[plan.chunks](log_w, k, v, a, b, plan.table, *prepared, inverse, KEEP=keep, **plan.settings)
        through = v, k_hat, reach, removed, b_hat, decay
        _scan(plan, state, *through, states=states, end=last_state, reverse=False)
        output[plan.chunks](r, log_w, k, v, b, removed, states, plan.table, y, **plan.settings)
    kept = states, removed, inverse
    return y, last_state, *(kept if keep else (x.new_empty(0, *x.shape[1:]) for x in kept))


@_forward.register_fake
def _(r, _log_w, _k, v, _a, _b, state, cu_seqlens, keep):
    return _empty_results(r, v, state, cu_seqlens, keep)


@torch.library.custom_op("rookery::wkv7_triton_backward", mutates_args=())
def _backward(
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None,
    states: Tensor,
    removed: Tensor,
    inverse: Tensor,
    grad_y: Tensor | None,
    grad_last_state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of r, log_w, k, v, a, b and the initial state, each in the dtype of its tensor."""
    from rookery.ops.wkv7.triton_backward import prepare_backward, query_gradients, write_gradients

    r, log_w, k, v, a, b = (x.contiguous() for x in (r, log_w, k, v, a, b))
    results = grad_r, grad_log_w, grad_k, grad_v, grad_a, grad_b, grad_state = _empty_like(r, log_w, k, v, a, b, state)
    grad_y = torch.zeros_like(v) if grad_y is None else grad_y.contiguous()
    grad_last_state = torch.zeros_like(grad_state) if grad_last_state is None else grad_last_state.contiguous()
    if not r.numel() or not v.numel():
        return *(x.zero_() for x in results[:6]), grad_last_state.clone()
    with torch.cuda.device_of(r):
        plan = _plan(r, state, cu_seqlens)
        reach, r_fall, a_fall = (torch.empty_like(k, dtype=plan.kept) for _ in range(3))
        through, grad_states = torch.empty_like(removed), torch.empty_like(states)
        decay = state.new_empty(plan.slots, plan.heads, k.shape[3])
        prepared = reach, through, r_fall, a_fall, decay
        prepare_backward[plan.chunks](r, log_w, a, b, grad_y, inverse, plan.table, *prepared, **plan.settings)
        tensors = grad_y, r_fall, reach, through, a_fall, decay
        _scan(plan, grad_last_state, *tensors, states=grad_states, end=grad_state, reverse=True)
        inputs, found = (r, log_w, k, v, a, b), (grad_y, removed, through, states)
        # the tiles of these two do not fit into the registers of four warps
        settings = plan.settings | {"num_warps": 8}
        query_gradients[plan.chunks](*inputs, *found, plan.table, grad_r, grad_a, grad_log_w, **settings)
        found += grad_states, plan.table
        write_gradients[plan.chunks](*inputs, *found, grad_k, grad_v, grad_b, grad_log_w, **settings)
    return results


@_backward.register_fake
def _(*tensors):
    return _empty_like(*tensors[:7])


@torch.library.custom_op("rookery::wkv7_triton_step", mutates_args=())
def _step(r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token of every row, without gradients."""
    import triton

    from rookery.ops.wkv7.triton_forward import step

    r, log_w, k, v, a, b, state = (x.contiguous() for x in (r, log_w, k, v, a, b, state))
    y, next_state = results = _empty_like(v, state)
    if not state.numel():
        return y.zero_(), next_state
    rows, heads, value, key = state.shape
    block_k = max(16, triton.next_power_of_2(key))
    # 2048 numbers of the state a program: 16 a thread, loaded at once
    block_v = min(max(1, 2048 // block_k), triton.next_power_of_2(value))
    grid = (rows * heads * -(-value // block_v),)
    sizes = {"KEY": key, "VALUE": value, "BLOCK_K": block_k, "BLOCK_V": block_v}
    with torch.cuda.device_of(r):
        step[grid](r, log_w, k, v, a, b, state, y, next_state, **sizes, num_warps=4)
    return results


@_step.register_fake
def _(_r, _log_w, _k, v, _a, _b, state):
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _, heads, value, key = state.shape
    chunk, slots = _chunk(r), _slots(r, state, cu_seqlens)
    kept = torch.bfloat16 if r.dtype == torch.bfloat16 else torch.float32
    return (
        *_empty_like(v, state),
        v.new_empty(slots if keep else 0, heads, value, key, dtype=kept),
        v.new_empty(v.shape if keep else (0, *v.shape[1:]), dtype=kept),
        v.new_empty(slots if keep else 0, heads, chunk, chunk, dtype=kept),
    )


def _empty_like(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors)
