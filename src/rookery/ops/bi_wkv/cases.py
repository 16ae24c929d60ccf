"""Calls that tests, benchmarks and `rookery doctor` make of bi_wkv."""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Case:
    """A call: sizes, how fast weights change with the distance, and which variant."""

    batch: int = 2
    time: int = 5
    channels: int = 24
    decay: tuple[float, float] = (-5.0, 3.0)
    """Bounds of omega times the number of tokens, which is uniform between them; Vision-RWKV starts with these."""
    spread: float = 1.0
    """Standard deviation of the keys, which stand in exponents."""
    compat: str = "exact"


CASES = [
    Case(),
    Case(batch=1, time=1, channels=1),
    Case(batch=3, time=2, channels=7),
    Case(time=31, channels=33),
    Case(batch=1, time=64, channels=64),
    Case(batch=1, time=65, channels=150),
    Case(batch=1, time=196, channels=20),
    Case(batch=1, time=100, decay=(-30.0, 30.0), spread=3.0),
    Case(batch=1, time=100, decay=(-60.0, 3000.0)),
    Case(batch=1, time=70, decay=(0.0, 0.0), spread=6.0),
    Case(batch=3, time=0),
    Case(batch=0, time=4),
    Case(time=40, compat="cuda32"),
]
BENCHMARKS = [Case(batch=1, time=time, channels=192) for time in (196, 1024, 4096, 16384)]


def make(case: Case, generator: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
    """The operator's arguments as Vision-RWKV makes them."""
    wide = torch.promote_types(dtype, torch.float32)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    low, high = case.decay
    decay = low + (high - low) * torch.rand(case.channels, generator=generator, dtype=torch.float64)
    return {
        "omega": (decay / max(1, case.time)).to(wide),
        "mu": (normal(case.channels) / max(1, case.time)).to(wide),
        "k": (case.spread * normal(case.batch, case.time, case.channels)).to(dtype),
        "v": normal(case.batch, case.time, case.channels).to(dtype),
        "compat": case.compat,
    }
