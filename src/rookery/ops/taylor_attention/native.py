"""One step of Taylor attention in C++ (native/kernels/taylor_attention.cpp): features, update and read in one pass.

Float32 arithmetic on float32 or bfloat16 inputs, on the CPU. A step reads and writes every number of the state once;
chunks of many tokens are better off as products of matrices, see chunked.py.
"""

from typing import Any

import torch
from torch import Tensor

from rookery.ops.dispatch import native_module, native_why_not
from rookery.ops.native import DTYPES, addresses, elementwise_why_not
from rookery.ops.taylor_attention import chunked


def why_not(*, q, k, v, state, cu_seqlens=None) -> str | None:
    """Reason that this call cannot run here, or None."""
    if reason := elementwise_why_not(q, k, v) or native_why_not(state, dtypes=DTYPES[:1]):
        return reason
    return step_why_not(q, cu_seqlens)


def step_why_not(q: Tensor, cu_seqlens: Tensor | None) -> str | None:
    """Reason that a call is no step of decoding, or None."""
    if cu_seqlens is not None:
        return "it takes one token a row, not packed documents"
    return None if q.shape[1] == 1 else f"it takes one token a row, these rows have {q.shape[1]}"


def taylor_attention(
    *, q: Tensor, k: Tensor, v: Tensor, state: Tensor, cu_seqlens: Tensor | None = None, isa: str = ""
) -> tuple[Tensor, Tensor]:
    """As `rookery.ops.taylor_attention.taylor_attention`; `isa` forces an instruction set."""
    return _step(q, k, v, state, isa)


@torch.library.custom_op("rookery::taylor_attention_step", mutates_args=())
def _step(q: Tensor, k: Tensor, v: Tensor, state: Tensor, isa: str) -> tuple[Tensor, Tensor]:
    q, k, v, state = (x.contiguous() for x in (q, k, v, state))
    y, after = torch.empty_like(v), torch.empty_like(state)
    native_module().taylor_attention_step(
        **addresses(q=q, k=k, v=v, state=state, y=y, after=after),
        heads=state.shape[0] * state.shape[1],
        key=q.shape[3],
        value=v.shape[3],
        bfloat16=q.dtype == torch.bfloat16,
        threads=torch.get_num_threads(),
        isa=isa,
    )
    return y, after


@_step.register_fake
def _(_q, _k, v, state, _isa):
    return v.new_empty(v.shape), state.new_empty(state.shape)


def save(ctx: Any, inputs: tuple, output: tuple) -> None:
    """Keeps the four tensors of a step for `gradient`."""
    ctx.save_for_backward(*inputs[:4])


def gradient(ctx: Any, grad_y: Tensor, grad_state: Tensor) -> tuple[Tensor, ...]:
    """Gradients of a step's q, k, v and state, by the chunked backend: nobody trains on rows of one token."""
    leaves = [x.detach().requires_grad_() for x in ctx.saved_tensors]
    with torch.enable_grad():
        results = chunked.taylor_attention(**dict(zip(("q", "k", "v", "state"), leaves)))
    return torch.autograd.grad(results, leaves, (grad_y, grad_state))


_step.register_autograd(lambda ctx, *grads: (*gradient(ctx, *grads), None), setup_context=save)
