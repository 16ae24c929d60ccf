"""Calls that tests, benchmarks and `rookery doctor` make of wkv4."""

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch


@dataclass(frozen=True)
class Case:
    """A call: sizes, how large the keys are, and the lengths of the documents where they are packed in one row."""

    batch: int = 2
    time: int = 5
    channels: int = 24
    key_scale: float = 1.0
    fresh: bool = False
    """Nothing came before the first token."""
    lengths: tuple[int, ...] | None = None


CASES = [
    Case(),
    Case(batch=1, time=1, channels=1),
    Case(batch=3, time=2, channels=7, fresh=True),
    Case(time=100, channels=33),
    Case(time=40, channels=16, key_scale=30.0),
    Case(batch=3, time=0),
    Case(batch=1, time=40, channels=20, lengths=(0, 4, 0, 0, 1, 35, 0)),
    Case(batch=1, time=0, channels=20, lengths=(0, 0)),
]
BENCHMARKS = [Case(batch=8, time=512, channels=256, fresh=True)]


def make(case: Case, generator: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
    """The operator's arguments."""
    rows = case.batch if case.lengths is None else len(case.lengths)
    tokens = (case.batch, case.time, case.channels)
    wide = torch.promote_types(dtype, torch.float32)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    top = torch.full((rows, case.channels), -1e38, dtype=torch.float64) if case.fresh else normal(rows, case.channels)
    sums = [normal(rows, case.channels), 0.5 + normal(rows, case.channels).abs()]
    return {
        "log_w": -normal(case.channels).exp().to(dtype),
        "u": normal(case.channels).to(dtype),
        "k": (case.key_scale * normal(*tokens)).to(dtype),
        "v": normal(*tokens).to(dtype),
        "state": torch.stack([*(0 * x if case.fresh else x for x in sums), top], dim=1).to(wide),
        "cu_seqlens": None if case.lengths is None else torch.tensor([0, *accumulate(case.lengths)]),
    }
