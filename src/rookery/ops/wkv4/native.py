"""WKV-4 in C++ (native/kernels/wkv4.cpp): float32 arithmetic on float32 or bfloat16 inputs, on the CPU.

The forward pass keeps a state every few tokens where gradients are needed; the backward pass recomputes the others.
"""

import torch
from torch import Tensor

from rookery.ops.dispatch import native_module, native_why_not
from rookery.ops.native import address, empty_checkpoints, empty_like, sequence_starts


def why_not(*, log_w, u, k, v, state, cu_seqlens=None) -> str | None:
    """Reason that this call cannot run here, or None."""
    if reason := native_why_not(log_w, u, k, v, dtypes=(torch.float32, torch.bfloat16)):
        return reason
    return native_why_not(state, dtypes=(torch.float32,))


def wkv4(
    *,
    log_w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None = None,
    isa: str = "",
) -> tuple[Tensor, Tensor]:
    """As `rookery.ops.wkv4.wkv4`; `isa` forces an instruction set (`_native.available_isas`)."""
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in (log_w, u, k, v, state))
    return _forward(log_w, u, k, v, state, cu_seqlens, keep, isa)[:2]


@torch.library.custom_op("rookery::wkv4_native_forward", mutates_args=())
def _forward(
    log_w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None,
    keep: bool,
    isa: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs and last state; with `keep`, the checkpoints that the backward pass needs (else empty)."""
    log_w, u, k, v, state = log_w.float().contiguous(), u.float().contiguous(), *_contiguous(k, v, state)
    y, last_state, checkpoints = results = _empty_results(k, v, state, cu_seqlens, keep)
    native_module().wkv4_forward(
        starts=sequence_starts(k, cu_seqlens),
        channels=k.shape[2],
        log_w=log_w.data_ptr(),
        u=u.data_ptr(),
        k=address(k),
        v=address(v),
        state=state.data_ptr(),
        y=address(y),
        last_state=last_state.data_ptr(),
        checkpoints=checkpoints.data_ptr(),
        threads=torch.get_num_threads(),
        isa=isa,
    )
    return results


@_forward.register_fake
def _(_log_w, _u, k, v, state, cu_seqlens, keep, _isa):
    return _empty_results(k, v, state, cu_seqlens, keep)


@torch.library.custom_op("rookery::wkv4_native_backward", mutates_args=())
def _backward(
    log_w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None,
    checkpoints: Tensor,
    grad_y: Tensor | None,
    grad_last_state: Tensor | None,
    isa: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of log_w, u, k, v and the initial state, each in the dtype of its tensor."""
    wide_log_w, wide_u, k, v, state = log_w.float().contiguous(), u.float().contiguous(), *_contiguous(k, v, state)
    grad_k, grad_v, grad_state = empty_like(k, v, state)
    # one for every row, added up below
    grad_log_w, grad_u = (state.new_empty(state.shape[0], k.shape[2]) for _ in range(2))
    grad_y = None if grad_y is None else grad_y.contiguous()
    grad_last_state = None if grad_last_state is None else grad_last_state.contiguous()
    native_module().wkv4_backward(
        starts=sequence_starts(k, cu_seqlens),
        channels=k.shape[2],
        log_w=wide_log_w.data_ptr(),
        u=wide_u.data_ptr(),
        k=address(k),
        v=address(v),
        state=state.data_ptr(),
        checkpoints=checkpoints.data_ptr(),
        grad_y=(0, False) if grad_y is None else address(grad_y),
        grad_last_state=0 if grad_last_state is None else grad_last_state.data_ptr(),
        grad_log_w=grad_log_w.data_ptr(),
        grad_u=grad_u.data_ptr(),
        grad_k=address(grad_k),
        grad_v=address(grad_v),
        grad_state=grad_state.data_ptr(),
        threads=torch.get_num_threads(),
        isa=isa,
    )
    return grad_log_w.sum(0).to(log_w.dtype), grad_u.sum(0).to(u.dtype), grad_k, grad_v, grad_state


@_backward.register_fake
def _(*tensors_and_settings):
    return empty_like(*tensors_and_settings[:5])


def _setup_context(ctx, inputs, output) -> None:
    *tensors, _keep, ctx.isa = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad_y, grad_last_state, _checkpoints):
    return *_backward(*ctx.saved_tensors, grad_y, grad_last_state, ctx.isa), None, None, None


_forward.register_autograd(_differentiate, setup_context=_setup_context)


def _empty_results(
    k: Tensor, v: Tensor, state: Tensor, cu_seqlens: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    checkpoints = empty_checkpoints(k, state, cu_seqlens, native_module().WKV4_CHUNK, (3, k.shape[2]), keep)
    return *empty_like(v, state), checkpoints


def _contiguous(*tensors: Tensor) -> list[Tensor]:
    return [x.contiguous() for x in tensors]
