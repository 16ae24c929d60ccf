"""Calls that tests, benchmarks and `rookery doctor` make of token_shift."""

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch


@dataclass(frozen=True)
class Case:
    """A call: sizes, and the lengths of the documents where they are packed in one row of `time` tokens."""

    batch: int = 2
    time: int = 5
    channels: int = 24
    mixes: int = 3
    lengths: tuple[int, ...] | None = None


CASES = [
    Case(),
    Case(batch=1, time=1, channels=1, mixes=1),
    Case(time=2, channels=7, mixes=6),
    Case(batch=3, time=0),
    Case(batch=3, time=333, channels=65, mixes=2),
    Case(batch=1, time=9, channels=20, lengths=(0, 4, 0, 0, 1, 4, 0)),
    Case(batch=1, time=0, channels=20, lengths=(0, 0)),
    Case(batch=1, time=300, channels=33, mixes=6, lengths=(15, 1, 0, 100, 17, 16, 151)),
]
BENCHMARKS = [Case(batch=16, time=512, channels=256, mixes=6)]


def make(case: Case, generator: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
    """The operator's arguments."""
    rows = case.batch if case.lengths is None else len(case.lengths)
    normal = {"generator": generator, "dtype": torch.float64}
    return {
        "x": torch.randn(case.batch, case.time, case.channels, **normal).to(dtype),
        "mix": torch.rand(case.mixes, case.channels, **normal).to(dtype),
        "previous": torch.randn(rows, case.channels, **normal).to(dtype),
        "cu_seqlens": None if case.lengths is None else torch.tensor([0, *accumulate(case.lengths)]),
    }
