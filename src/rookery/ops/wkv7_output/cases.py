"""Calls that tests, benchmarks and `rookery doctor` make of wkv7_output."""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Case:
    """A call: sizes, the size of y, and what is added to all of it."""

    batch: int = 2
    time: int = 5
    heads: int = 3
    head_dim: int = 8
    scale: float = 1.0
    offset: float = 0.0


CASES = [
    Case(),
    Case(batch=1, time=1, heads=1, head_dim=3),
    Case(time=2, head_dim=20),
    Case(batch=3, time=0),
    Case(batch=3, time=111, heads=2, head_dim=64),
    Case(time=7, head_dim=16, scale=30.0, offset=10.0),
    Case(time=7, head_dim=16, scale=0.0, offset=2.0),  # no variance: eps decides
]
BENCHMARKS = [Case(batch=16, time=512, heads=4, head_dim=64)]


def make(case: Case, generator: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
    """The operator's arguments."""
    shape = (case.batch, case.time, case.heads, case.head_dim)
    width = case.heads * case.head_dim

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "y": normal(*shape) * case.scale + case.offset,
        "r": normal(*shape),
        "k": normal(*shape),
        "v": normal(*shape),
        "gate": normal(case.batch, case.time, width),
        "r_k": normal(case.heads, case.head_dim) / 4,
        "weight": normal(width),
        "bias": normal(width),
        "eps": 64e-5,
    }
