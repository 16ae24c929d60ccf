"""Initial weights: drawn on the CPU in float32, so that a seed means the same on every device and in every dtype."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class WithoutInit(TorchFunctionMode):
    """Modules built in this context keep the memory they were given.

    torch's own layers draw initial values that `init_weights` replaces: for a large model that takes longer than
    everything else, and it moves the global random state of a program that only wanted to load a file.
    """

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def normal_(weight: Tensor, std: float, generator: torch.Generator) -> None:
    """Fills `weight` from N(0, std)."""
    weight.copy_(torch.randn(weight.shape, generator=generator) * std)


def uniform_(weight: Tensor, bound: float, generator: torch.Generator) -> None:
    """Fills `weight` from U(−bound, bound)."""
    weight.copy_((torch.rand(weight.shape, generator=generator) * 2 - 1) * bound)


def orthogonal_(weight: Tensor, gain: float, generator: torch.Generator) -> None:
    """Fills the matrix `weight` with orthonormal rows or columns, whichever are fewer, times `gain`."""
    rows, columns = weight.shape
    # drawn on the CPU, decomposed where the weight lies: only the rounding depends on the device
    tall = torch.randn(max(rows, columns), min(rows, columns), generator=generator).to(weight.device)
    q, r = torch.linalg.qr(tall)
    q = q * r.diagonal().sign()  # makes the decomposition unique, and with it the distribution uniform
    weight.copy_(gain * (q if rows >= columns else q.T))
