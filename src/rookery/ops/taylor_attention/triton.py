"""One step of Taylor attention in Triton: features, update and read in one pass over the state."""

import torch
from torch import Tensor

from rookery.ops.dispatch import triton_why_not
from rookery.ops.taylor_attention.native import gradient, save, step_why_not
from rookery.ops.triton import elementwise_why_not, power_of_two

ROWS = 16
"""Values of a head that a program works on."""


def why_not(*, q, k, v, state, cu_seqlens=None) -> str | None:
    """Reason that this call cannot run here, or None."""
    if reason := elementwise_why_not(q, k, v) or triton_why_not(state, dtypes=(torch.float32,)):
        return reason
    return step_why_not(q, cu_seqlens)


def taylor_attention(
    *, q: Tensor, k: Tensor, v: Tensor, state: Tensor, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `rookery.ops.taylor_attention.taylor_attention`, with arithmetic in float32."""
    return _step(q, k, v, state)


@torch.library.custom_op("rookery::taylor_attention_triton", mutates_args=())
def _step(q: Tensor, k: Tensor, v: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    from rookery.ops.taylor_attention.triton_kernels import step

    q, k, v, state = (x.contiguous() for x in (q, k, v, state))
    y, after = torch.empty_like(v), torch.empty_like(state)
    rows, heads, values, size = state.shape
    if not state.numel():
        return y, after
    with torch.cuda.device_of(q):
        step[(rows * heads * -(-(values - 1) // ROWS),)](
            *(q, k, v, state, y, after),
            KEY=q.shape[3],
            VALUE=values - 1,
            SIZE=size,
            BLOCK=power_of_two(size),
            ROWS=ROWS,
        )
    return y, after


@_step.register_fake
def _(_q, _k, v, state):
    return v.new_empty(v.shape), state.new_empty(state.shape)


_step.register_autograd(gradient, setup_context=save)
