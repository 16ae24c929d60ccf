"""Calls that tests, benchmarks and `rookery doctor` make of relu_squared."""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Case:
    """A call: the shape of x and the size of its values."""

    shape: tuple[int, ...] = (2, 5, 24)
    scale: float = 1.0


CASES = [Case(), Case((1,)), Case((0, 3)), Case((3, 1, 7)), Case((2, 33, 1027)), Case((4, 40), scale=30.0)]
BENCHMARKS = [Case((16, 512, 1024))]


def make(case: Case, generator: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
    """The operator's arguments."""
    return {"x": case.scale * torch.randn(case.shape, generator=generator, dtype=torch.float64).to(dtype)}
