"""A frozen base in 8 or 4 bits under an adapter that learns (QLoRA, arXiv 2305.14314, with plain groups for NF4).

Every adapted matrix is kept as whole numbers with a scale for each group of 64 (8 bits) or 32 (4 bits) inputs and made
into floats where it is used, in the backward pass once more: no float copy of it is held.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from rookery.adapt.peft import adapted_layers

Bits = Literal["int8", "int4"]
GROUP = {"int8": 64, "int4": 32}
LARGEST = {"int8": 127, "int4": 7}


class QuantisedLinear(nn.Linear):
    """A linear layer whose weight does not learn and takes a quarter or an eighth of float32's room."""

    def __init__(self, layer: nn.Linear, bits: Bits) -> None:
        nn.Module.__init__(self)  # not Linear's, which makes a float weight
        self.in_features, self.out_features, self.bits = layer.in_features, layer.out_features, bits
        self.bias = layer.bias
        self.dtype = layer.weight.dtype
        groups = pad(layer.weight.detach().float(), (0, -layer.in_features % GROUP[bits])).unflatten(
            1, (-1, GROUP[bits])
        )
        scale = groups.abs().amax(-1).clamp(min=1e-30) / LARGEST[bits]
        numbers = (groups / scale[..., None]).round().to(torch.int8)
        if bits == "int4":  # two in a byte, 8 added to make them positive
            low, high = (numbers + 8).unflatten(-1, (-1, 2)).unbind(-1)
            numbers = (low + 16 * high.to(torch.uint8)).to(torch.uint8)
        self.register_buffer("numbers", numbers)
        # as whole numbers, which no change of the model's float type rounds
        self.register_buffer("scale", scale.view(torch.int32))

    @property
    def weight(self) -> Tensor:
        """[out, in] floats, made anew for every use."""
        numbers = self.numbers
        if self.bits == "int4":
            numbers = torch.stack([numbers & 15, numbers >> 4], dim=-1).flatten(-2).to(torch.int8) - 8
        whole = (numbers.float() * self.scale.view(torch.float32)[..., None]).flatten(1)
        return whole[:, : self.in_features].to(self.dtype)

    def _apply(self, change: Any, recurse: bool = True) -> nn.Module:
        """Follows the model to another float type."""
        super()._apply(change, recurse)
        self.dtype = change(torch.empty(0, dtype=self.dtype, device=self.scale.device)).dtype
        return self

    def forward(self, x: Tensor) -> Tensor:
        return _Product.apply(x, self)

    def as_float(self) -> nn.Linear:
        """An ordinary layer with these rounded weights."""
        layer = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        layer.weight, layer.bias = nn.Parameter(self.weight), self.bias
        return layer


class _Product(torch.autograd.Function):
    """x Wᵀ + b that keeps neither x nor W for the backward pass: W does not learn."""

    @staticmethod
    def forward(context: Any, x: Tensor, layer: QuantisedLinear) -> Tensor:
        context.layer = layer
        return linear(x, layer.weight.to(x.dtype), layer.bias)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ context.layer.weight.to(gradient.dtype), None


def quantise_base(model: nn.Module, bits: Bits) -> None:
    """Rounds the matrices under the model's adapters, in place; what an adapter took out of them (PiSSA) is out."""
    for layer in adapted_layers(model).values():
        layer.base_layer = QuantisedLinear(layer.get_base_layer(), bits)


def restore_base(model: nn.Module) -> None:
    """Makes them floats again, the rounded ones: an adapter learned on these belongs to these."""
    for layer in adapted_layers(model).values():
        if isinstance(base := layer.get_base_layer(), QuantisedLinear):
            layer.base_layer = base.as_float()


def held_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
