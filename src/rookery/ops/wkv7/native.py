"""WKV-7 in C++ (native/kernels/wkv7.cpp): float32 arithmetic on float32 or bfloat16 inputs, on the CPU.

The forward pass keeps a state every few tokens where gradients are needed; the backward pass recomputes the others.
"""

import torch
from torch import Tensor

from rookery.ops.dispatch import native_module, native_why_not
from rookery.ops.native import address, empty_checkpoints, empty_like, sequence_starts

MULTIPLE = 16
"""Keys and values of a head come in multiples of this: one vector of the widest instruction set."""


def why_not(*, r, log_w, k, v, a, b, state, cu_seqlens=None) -> str | None:
    """Reason that this call cannot run here, or None."""
    if reason := native_why_not(r, log_w, k, v, a, b, dtypes=(torch.float32, torch.bfloat16)):
        return reason
    if reason := native_why_not(state, dtypes=(torch.float32,)):
        return reason
    if state.shape[2] % MULTIPLE or state.shape[3] % MULTIPLE:
        return f"value and key sizes are multiples of {MULTIPLE}, these are {state.shape[2]} and {state.shape[3]}"
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
    isa: str = "",
) -> tuple[Tensor, Tensor]:
    """As `rookery.ops.wkv7.wkv7`; `isa` forces an instruction set (`_native.available_isas`)."""
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in (r, log_w, k, v, a, b, state))
    return _forward(r, log_w, k, v, a, b, state, cu_seqlens, keep, isa)[:2]


@torch.library.custom_op("rookery::wkv7_native_forward", mutates_args=())
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
    isa: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Outputs and last state; with `keep`, the checkpoints and S a that the backward pass needs (else empty)."""
    inputs = [x.contiguous() for x in (r, log_w, k, v, a, b)]
    state = state.contiguous()
    y, last_state, checkpoints, removed = results = _empty_results(r, v, state, cu_seqlens, keep)
    native_module().wkv7_forward(
        starts=sequence_starts(r, cu_seqlens),
        sizes=[state.shape[1], state.shape[3], state.shape[2]],
        inputs=[address(x) for x in inputs],
        state=state.data_ptr(),
        y=address(y),
        last_state=last_state.data_ptr(),
        checkpoints=checkpoints.data_ptr(),
        removed=removed.data_ptr(),
        threads=torch.get_num_threads(),
        isa=isa,
    )
    return results


@_forward.register_fake
def _(r, _log_w, _k, v, _a, _b, state, cu_seqlens, keep, _isa):
    return _empty_results(r, v, state, cu_seqlens, keep)


@torch.library.custom_op("rookery::wkv7_native_backward", mutates_args=())
def _backward(
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None,
    checkpoints: Tensor,
    removed: Tensor,
    grad_y: Tensor | None,
    grad_last_state: Tensor | None,
    isa: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of r, log_w, k, v, a, b and the initial state, each in the dtype of its tensor."""
    inputs = [x.contiguous() for x in (r, log_w, k, v, a, b)]
    grads = empty_like(*inputs, state)
    grad_y = None if grad_y is None else grad_y.contiguous()
    grad_last_state = None if grad_last_state is None else grad_last_state.contiguous()
    native_module().wkv7_backward(
        starts=sequence_starts(r, cu_seqlens),
        sizes=[state.shape[1], state.shape[3], state.shape[2]],
        inputs=[address(x) for x in inputs],
        checkpoints=checkpoints.data_ptr(),
        removed=removed.data_ptr(),
        grad_y=(0, False) if grad_y is None else address(grad_y),
        grad_last_state=0 if grad_last_state is None else grad_last_state.data_ptr(),
        grads=[address(x) for x in grads[:6]],
        grad_state=grads[6].data_ptr(),
        threads=torch.get_num_threads(),
        isa=isa,
    )
    return grads


@_backward.register_fake
def _(*tensors_and_settings):
    return empty_like(*tensors_and_settings[:7])


def _setup_context(ctx, inputs, output) -> None:
    *tensors, _keep, ctx.isa = inputs
    ctx.save_for_backward(*tensors, *output[2:])
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad_y, grad_last_state, _checkpoints, _removed):
    grads = _backward(*ctx.saved_tensors, grad_y, grad_last_state, ctx.isa)
    return *grads, None, None, None


_forward.register_autograd(_differentiate, setup_context=_setup_context)


def _empty_results(
    r: Tensor, v: Tensor, state: Tensor, cu_seqlens: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, tokens = r.shape[:2]
    removed = state.new_empty(batch if keep else 0, tokens, *state.shape[1:3])
    checkpoints = empty_checkpoints(r, state, cu_seqlens, native_module().WKV7_CHUNK, state.shape[1:], keep)
    return *empty_like(v, state), checkpoints, removed
