"""Calls that tests, benchmarks and `rookery doctor` make of wkv7_inputs."""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Case:
    """A call: sizes, the size of the logits, and whether some heads' keys are zero or nearly so."""

    batch: int = 2
    time: int = 5
    heads: int = 3
    head_dim: int = 8
    logit_scale: float = 1.0
    vanishing_keys: bool = False


CASES = [
    Case(),
    Case(batch=1, time=1, heads=1, head_dim=3),
    Case(time=2, head_dim=20),
    Case(batch=3, time=0),
    Case(batch=3, time=111, heads=2, head_dim=64),
    Case(time=7, head_dim=16, logit_scale=30.0),
    Case(time=7, head_dim=16, vanishing_keys=True),
]
BENCHMARKS = [Case(batch=16, time=512, heads=4, head_dim=64)]


def make(case: Case, generator: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
    """The operator's arguments."""
    shape = (case.batch, case.time, case.heads * case.head_dim)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    k = normal(*shape)
    if case.vanishing_keys:
        # the norm's floor is 1e-12: exactly zero keys and some that are not zero lie below it
        k[:, ::2] *= 1e-14
        k[:, ::4] = 0
    return {
        "k": k.to(dtype),
        "decay_logit": (case.logit_scale * normal(*shape)).to(dtype),
        "rate_logit": (case.logit_scale * normal(*shape)).to(dtype),
        "k_k": (0.7 + 0.2 * normal(shape[2])).to(dtype),
        "k_a": (1 + 0.2 * normal(shape[2])).to(dtype),
        "head_dim": case.head_dim,
    }
