"""Calls that tests, benchmarks and `rookery doctor` make of linear_cross_entropy."""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Case:
    """A call: sizes, the size of the logits, the share of targets that are ignored, and the official pull."""

    tokens: int = 10
    channels: int = 12
    vocabulary: int = 37
    logit_scale: float = 1.0
    ignored: float = 0.0
    ignore_index: int = -100
    l2wrap: float = 0.0


CASES = [
    Case(),
    Case(tokens=1, vocabulary=5),
    Case(tokens=333, channels=8, vocabulary=250, l2wrap=1e-4),
    Case(tokens=65, vocabulary=128, ignored=0.4, l2wrap=0.1),
    Case(tokens=33, ignored=0.5, ignore_index=0),
    Case(tokens=20, logit_scale=30.0, l2wrap=1e-2),
]
# probabilities are rounded to bfloat16 before they are multiplied with features and weights
BUDGET = {name: {torch.bfloat16: (4e-3, 1e-2)} for name in ("native", "chunked")}
BENCHMARKS = [Case(tokens=16 * 512, channels=256, vocabulary=2048, l2wrap=1e-4)]


def make(case: Case, generator: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
    """The operator's arguments."""

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    targets = torch.randint(case.vocabulary, (case.tokens,), generator=generator)
    ignored = torch.rand(case.tokens, generator=generator) < case.ignored
    return {
        "features": (case.logit_scale * normal(case.tokens, case.channels)).to(dtype),
        "weight": (normal(case.vocabulary, case.channels) / case.channels**0.5).to(dtype),
        "targets": targets.masked_fill(ignored, case.ignore_index),
        "ignore_index": case.ignore_index,
        "l2wrap": case.l2wrap,
    }
