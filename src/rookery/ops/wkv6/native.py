"""WKV-6 in C++ (native/kernels/wkv6.cpp): float32 arithmetic on float32 or bfloat16 inputs, on the CPU.

The forward pass keeps a state every few tokens where gradients are needed; the backward pass recomputes the others.
The decay may also be one for all tokens, log_w [h, k], as RWKV-5 has it: it is then not read once per token.
"""

import torch
from torch import Tensor

from rookery.ops.dispatch import native_module, native_why_not
from rookery.ops.native import address, empty_checkpoints, empty_like, sequence_starts

MULTIPLE = 16
"""Keys and values of a head come in multiples of this: one vector of the widest instruction set."""


def why_not(*, r, log_w, k, v, u, state, cu_seqlens=None) -> str | None:
    """Reason that this call cannot run here, or None."""
    if reason := native_why_not(r, log_w, k, v, u, dtypes=(torch.float32, torch.bfloat16)):
        return reason
    if reason := native_why_not(state, dtypes=(torch.float32,)):
        return reason
    if state.shape[2] % MULTIPLE or state.shape[3] % MULTIPLE:
        return f"value and key sizes are multiples of {MULTIPLE}, these are {state.shape[2]} and {state.shape[3]}"
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
    isa: str = "",
) -> tuple[Tensor, Tensor]:
    """As `rookery.ops.wkv6.wkv6`; `isa` forces an instruction set (`_native.available_isas`)."""
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in (r, log_w, k, v, u, state))
    return _forward(r, log_w, k, v, u, state, cu_seqlens, keep, isa)[:2]


@torch.library.custom_op("rookery::wkv6_native_forward", mutates_args=())
def _forward(
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None,
    keep: bool,
    isa: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs and last state; with `keep`, the checkpoints that the backward pass needs (else empty)."""
    inputs, u, state = [x.contiguous() for x in (r, log_w, k, v)], u.float().contiguous(), state.contiguous()
    y, last_state, checkpoints = results = _empty_results(r, v, state, cu_seqlens, keep)
    native_module().wkv6_forward(
        starts=sequence_starts(r, cu_seqlens),
        sizes=[state.shape[1], state.shape[3], state.shape[2]],
        inputs=[address(x) for x in inputs],
        constant_decay=log_w.dim() == 2,
        u=u.data_ptr(),
        state=state.data_ptr(),
        y=address(y),
        last_state=last_state.data_ptr(),
        checkpoints=checkpoints.data_ptr(),
        threads=torch.get_num_threads(),
        isa=isa,
    )
    return results


@_forward.register_fake
def _(r, _log_w, _k, v, _u, state, cu_seqlens, keep, _isa):
    return _empty_results(r, v, state, cu_seqlens, keep)


@torch.library.custom_op("rookery::wkv6_native_backward", mutates_args=())
def _backward(
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None,
    checkpoints: Tensor,
    grad_y: Tensor | None,
    grad_last_state: Tensor | None,
    isa: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of r, log_w, k, v, u and the initial state, each in the dtype of its tensor."""
    inputs, wide_u = [x.contiguous() for x in (r, log_w, k, v)], u.float().contiguous()
    grad_r, grad_log_w, grad_k, grad_v, _, grad_state = empty_like(*inputs, u, state)
    # one for every row, added up below
    rows, heads, _, key = state.shape
    grad_u = state.new_empty(rows, heads, key)
    if constant := log_w.dim() == 2:
        grad_log_w = state.new_empty(rows, heads, key)
    grad_y = None if grad_y is None else grad_y.contiguous()
    grad_last_state = None if grad_last_state is None else grad_last_state.contiguous()
    native_module().wkv6_backward(
        starts=sequence_starts(r, cu_seqlens),
        sizes=[heads, key, state.shape[2]],
        inputs=[address(x) for x in inputs],
        constant_decay=constant,
        u=wide_u.data_ptr(),
        checkpoints=checkpoints.data_ptr(),
        grad_y=(0, False) if grad_y is None else address(grad_y),
        grad_last_state=0 if grad_last_state is None else grad_last_state.data_ptr(),
        grads=[address(x) for x in (grad_r, grad_log_w, grad_k, grad_v)],
        grad_u=grad_u.data_ptr(),
        grad_state=grad_state.data_ptr(),
        threads=torch.get_num_threads(),
        isa=isa,
    )
    if constant:
        grad_log_w = grad_log_w.sum(0).to(log_w.dtype)
    return grad_r, grad_log_w, grad_k, grad_v, grad_u.sum(0).to(u.dtype), grad_state


@_backward.register_fake
def _(*tensors_and_settings):
    return empty_like(*tensors_and_settings[:6])


def _setup_context(ctx, inputs, output) -> None:
    *tensors, _keep, ctx.isa = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad_y, grad_last_state, _checkpoints):
    return *_backward(*ctx.saved_tensors, grad_y, grad_last_state, ctx.isa), None, None, None


_forward.register_autograd(_differentiate, setup_context=_setup_context)


def _empty_results(
    r: Tensor, v: Tensor, state: Tensor, cu_seqlens: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    checkpoints = empty_checkpoints(r, state, cu_seqlens, native_module().WKV6_CHUNK, state.shape[1:], keep)
    return *empty_like(v, state), checkpoints
