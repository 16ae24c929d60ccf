"""Calls that tests, benchmarks and `rookery doctor` make of wkv4."""

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from rookery.ops.wkv4 import empty_state


@dataclass(frozen=True)
class Case:
    """A call: sizes, how fast it forgets, and the lengths of the documents where they are packed in one row."""

    batch: int = 2
    time: int = 5
    channels: int = 24
    decay: tuple[float, float] = (-5.0, 1.0)
    """Bounds of log(−log_w), which is uniform between them: RWKV-4's raw decay."""
    spread: float = 1.0
    """Standard deviation of the keys and the bonus, which stand in exponents."""
    fresh: bool = False
    """Nothing has been read before the first token."""
    lengths: tuple[int, ...] | None = None


CASES = [
    Case(),
    Case(batch=1, time=1, channels=1, fresh=True),
    Case(batch=3, time=2, channels=7, fresh=True),
    Case(time=31, channels=33),
    Case(time=32, channels=64, fresh=True),
    Case(time=33, channels=150),
    Case(batch=1, time=300, channels=20),
    Case(batch=1, time=100, decay=(2.0, 12.0)),
    Case(batch=1, time=100, decay=(-12.0, -6.0)),
    Case(batch=1, time=100, spread=6.0),
    Case(batch=1, time=100, spread=6.0, decay=(-12.0, 3.0), fresh=True),
    Case(batch=3, time=0),
    Case(batch=1, time=101, lengths=(0, 33, 0, 0, 1, 64, 3, 0)),
    Case(batch=1, time=40, lengths=(40, 0), fresh=True),
    Case(batch=1, time=0, lengths=(0, 0)),
]
# the definition rounds `top` once per token, a slow decay always in the same direction
BUDGET = {"reference": {torch.float64: (1e-9, 1e-12), torch.float32: (1e-4, 3e-5)}}
BENCHMARKS = [Case(batch=batch, time=time, channels=256, fresh=True) for time, batch in ((512, 8), (4096, 1))]


def make(case: Case, generator: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
    """The operator's arguments as RWKV-4 makes them."""
    rows = case.batch if case.lengths is None else len(case.lengths)
    wide = torch.promote_types(dtype, torch.float32)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    low, high = case.decay
    raw = low + (high - low) * torch.rand(case.channels, generator=generator, dtype=torch.float64)
    # sums as they come out of the recurrence: the larger exponent stands for 1 in the total, averages for values
    total = 1 + normal(rows, case.channels).abs()
    state = torch.stack([normal(rows, case.channels) * total, total, case.spread * normal(rows, case.channels)], dim=1)
    return {
        "log_w": -raw.exp().to(wide),
        "u": (case.spread * normal(case.channels)).to(wide),
        "k": (case.spread * normal(case.batch, case.time, case.channels)).to(dtype),
        "v": normal(case.batch, case.time, case.channels).to(dtype),
        "state": empty_state(rows, case.channels, like=raw).to(wide) if case.fresh else state.to(wide),
        "cu_seqlens": None if case.lengths is None else torch.tensor([0, *accumulate(case.lengths)]),
    }
