"""Token shift in Triton: all mixtures in one pass forward; backward, one pass for x, mix and previous together."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rookery.ops.triton import PROGRAM, elementwise_why_not, power_of_two


def why_not(*, x: Tensor, mix: Tensor, previous: Tensor, cu_seqlens: Tensor | None = None) -> str | None:
    return elementwise_why_not(x, previous, parameters=(mix,))


def token_shift(
    *,
    x: Float[Tensor, "b t c"],
    mix: Float[Tensor, "n c"],
    previous: Float[Tensor, "rows c"],
    cu_seqlens: Int[Tensor, " d+1"] | None = None,
) -> tuple[Float[Tensor, "n b t c"], Float[Tensor, "rows c"]]:
    """As the reference, with arithmetic in float32. `cu_seqlens` is believed: looking at it would wait for the GPU."""
    return forward(x, mix, previous, cu_seqlens)


@torch.library.custom_op("rookery::token_shift_triton", mutates_args=())
def forward(x: Tensor, mix: Tensor, previous: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    from rookery.ops.token_shift.triton_kernels import shift

    x, mix, previous = x.contiguous(), mix.contiguous(), previous.contiguous()
    out = x.new_empty(mix.shape[0], *x.shape)
    if not x.numel():
        return out, previous.clone()
    documents = _Documents(x, cu_seqlens)
    settings = _settings(x, mix, cu_seqlens)
    with torch.cuda.device_of(x):
        shift[_grid(settings)](x, mix, previous, documents.begins, out, **settings)
    return out, documents.last(x, previous)


@torch.library.custom_op("rookery::token_shift_triton_backward", mutates_args=())
def backward(
    x: Tensor, mix: Tensor, previous: Tensor, cu_seqlens: Tensor | None, grad_out: Tensor, grad_last: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    from rookery.ops.token_shift.triton_kernels import shift_backward

    x, mix, previous = x.contiguous(), mix.contiguous(), previous.contiguous()
    grad_out, grad_last = grad_out.contiguous(), grad_last.contiguous()
    grad_x, grad_previous = torch.empty_like(x), grad_last.clone()  # where no token comes, `last` is `previous`
    if not x.numel():
        return grad_x, torch.zeros_like(mix), grad_previous
    documents = _Documents(x, cu_seqlens)
    settings = _settings(x, mix, cu_seqlens)
    parts = x.new_empty(-(-settings["tokens"] // settings["TOKENS"]), *mix.shape, dtype=torch.float32)
    arrived = documents.begins, documents.ends, grad_out, grad_last
    with torch.cuda.device_of(x):
        shift_backward[_grid(settings)](x, mix, previous, *arrived, grad_x, parts, grad_previous, **settings)
    return grad_x, parts.sum(dim=0).to(mix.dtype), grad_previous


class _Documents:
    """Where packed documents begin and end: for every token the document that does so with it, or −1."""

    def __init__(self, x: Tensor, cu_seqlens: Tensor | None) -> None:
        self.begins = self.ends = x
        self._filled = None
        if cu_seqlens is None:
            return
        tokens = x.shape[0] * x.shape[1]
        # bounds that lie are at least kept inside the tensors
        cu_seqlens = cu_seqlens.to(x.device, torch.int64).clamp(0, tokens)
        starts, self._stops = cu_seqlens[:-1], cu_seqlens[1:]
        self._filled = self._stops > starts
        document = torch.arange(len(starts), device=x.device, dtype=torch.int32)
        # empty documents are written beside the tokens, so that nothing waits to learn how many there are
        nowhere = document.new_full((2, tokens + 1), -1)
        self.begins = nowhere[0].scatter(0, torch.where(self._filled, starts, tokens), document)
        self.ends = nowhere[1].scatter(0, torch.where(self._filled, self._stops - 1, tokens), document)

    def last(self, x: Tensor, previous: Tensor) -> Tensor:
        """The last token of every row, or what came before it where it has none."""
        if self._filled is None:
            return x[:, -1].clone()
        return torch.where(self._filled[:, None], x[0, (self._stops - 1).clamp(min=0)], previous)


def _settings(x: Tensor, mix: Tensor, cu_seqlens: Tensor | None) -> dict[str, Any]:
    batch, time, channels = x.shape
    block = min(256, power_of_two(channels))
    return {
        "tokens": batch * time,
        "time": time,
        "MIXES": mix.shape[0],
        "SIZE": channels,
        "BLOCK": block,
        "TOKENS": PROGRAM // block,
        "PACKED": cu_seqlens is not None,
    }


def _grid(settings: dict[str, Any]) -> tuple[int]:
    tokens, channels = (settings["tokens"], settings["TOKENS"]), (settings["SIZE"], settings["BLOCK"])
    return (-(-tokens[0] // tokens[1]) * -(-channels[0] // channels[1]),)


@forward.register_fake
def _(x: Tensor, mix: Tensor, previous: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    return x.new_empty(mix.shape[0], *x.shape), previous.new_empty(previous.shape)


@backward.register_fake
def _(
    x: Tensor, mix: Tensor, previous: Tensor, cu_seqlens: Tensor | None, grad_out: Tensor, grad_last: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), mix.new_empty(mix.shape), previous.new_empty(previous.shape)


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs)


def _gradient(ctx: Any, grad_out: Tensor, grad_last: Tensor) -> tuple:
    return *backward(*ctx.saved_tensors, grad_out, grad_last), None


forward.register_autograd(_gradient, setup_context=_save)
