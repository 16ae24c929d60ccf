"""Bi-WKV in C++ (native/kernels/bi_wkv.cpp): float32 sums in logarithms on float32 or bfloat16 inputs, on the CPU.

One pass over the tokens in each direction, whatever the decay. The backward pass is linear in the tokens too: what the
outputs before a token and after it say to its key and value are two sums of the same form.
"""

from typing import Any

import torch
from torch import Tensor

from rookery.ops.dispatch import native_module, native_why_not
from rookery.ops.native import DTYPES, address, empty_like


def why_not(*, omega: Tensor, mu: Tensor, k: Tensor, v: Tensor, compat: str = "exact") -> str | None:
    """Reason that this call cannot run here, or None."""
    if compat != "exact":
        return f"it computes the exact form, not {compat!r}"
    return native_why_not(omega, mu, k, v, dtypes=DTYPES)


def bi_wkv(*, omega: Tensor, mu: Tensor, k: Tensor, v: Tensor, compat: str = "exact", isa: str = "") -> Tensor:
    """As `rookery.ops.bi_wkv.bi_wkv`; `isa` forces an instruction set (`_native.available_isas`)."""
    return _forward(omega, mu, k, v, isa)


@torch.library.custom_op("rookery::bi_wkv_native", mutates_args=())
def _forward(omega: Tensor, mu: Tensor, k: Tensor, v: Tensor, isa: str) -> Tensor:
    omega, mu, k, v = omega.float().contiguous(), mu.float().contiguous(), k.contiguous(), v.contiguous()
    (y,) = empty_like(v)
    native_module().bi_wkv_forward(**_inputs(omega, mu, k, v, isa), y=address(y))
    return y


@_forward.register_fake
def _(_omega, _mu, _k, v, _isa):
    return empty_like(v)[0]


@torch.library.custom_op("rookery::bi_wkv_native_backward", mutates_args=())
def _backward(
    omega: Tensor, mu: Tensor, k: Tensor, v: Tensor, grad_y: Tensor, isa: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtypes = omega.dtype, mu.dtype
    omega, mu, k, v = omega.float().contiguous(), mu.float().contiguous(), k.contiguous(), v.contiguous()
    grad_y, grad_k, grad_v = grad_y.contiguous(), *empty_like(k, v)
    # one for every row, added up below
    parts = [omega.new_empty(k.shape[0], k.shape[2]) for _ in range(2)]
    native_module().bi_wkv_backward(
        **_inputs(omega, mu, k, v, isa),
        grad_y=address(grad_y),
        grad_omega=parts[0].data_ptr(),
        grad_mu=parts[1].data_ptr(),
        grad_k=address(grad_k),
        grad_v=address(grad_v),
    )
    return *(part.sum(0).to(dtype) for part, dtype in zip(parts, dtypes)), grad_k, grad_v


@_backward.register_fake
def _(omega, mu, k, v, _grad_y, _isa):
    return empty_like(omega, mu, k, v)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.isa = inputs
    ctx.save_for_backward(*tensors)


_forward.register_autograd(
    lambda ctx, grad: (*_backward(*ctx.saved_tensors, grad, ctx.isa), None), setup_context=_setup_context
)


def _inputs(omega: Tensor, mu: Tensor, k: Tensor, v: Tensor, isa: str) -> dict[str, Any]:
    batch, tokens, channels = k.shape
    sizes = {"batch": batch, "tokens": tokens, "channels": channels}
    tensors = {"omega": omega.data_ptr(), "mu": mu.data_ptr(), "k": address(k), "v": address(v)}
    return sizes | tensors | {"threads": torch.get_num_threads(), "isa": isa}
