"""Calls that tests, benchmarks and `rookery doctor` make of wkv6 and wkv5."""

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch


@dataclass(frozen=True)
class Case:
    """A call: sizes, how fast it forgets, and the lengths of the documents where they are packed in one row."""

    batch: int = 2
    time: int = 5
    heads: int = 3
    key: int = 32
    value: int = 16
    decay: tuple[float, float] = (-7.0, 1.0)
    """Bounds of log(−log_w), which is uniform between them: RWKV-6's raw decay. Above 4.6 a decay is 0 in float32."""
    fresh: bool = False
    """The state before the first token is zero."""
    lengths: tuple[int, ...] | None = None


CASES = [
    Case(),
    Case(batch=1, time=1, heads=1, key=16, value=48),
    Case(batch=3, time=2, heads=2, value=80),
    Case(time=15, heads=1, key=64, value=64, fresh=True),
    Case(time=16),
    Case(time=17, key=48, value=32),
    Case(batch=1, time=65, heads=2, key=16, value=128),
    Case(batch=1, time=200, heads=2, fresh=True),
    Case(batch=1, time=66, heads=1, key=128, value=16),
    Case(batch=1, time=100, heads=2, decay=(3.0, 12.0)),
    Case(batch=1, time=100, heads=2, decay=(-12.0, 8.0)),
    Case(batch=1, time=100, heads=2, decay=(-16.0, -9.0)),
    Case(batch=3, time=0),
    Case(batch=1, time=101, heads=2, lengths=(0, 33, 0, 0, 1, 64, 3, 0)),
    Case(batch=1, time=0, lengths=(0, 0)),
    Case(batch=3, time=21, key=8, value=5),
]
# Triton multiplies the inputs and the states in the inputs' precision (float16 in tf32), as others do on GPUs
BUDGET = {
    "triton": {
        torch.float64: (1e-9, 1e-12),
        torch.float32: (1e-5, 3e-6),
        torch.bfloat16: (1e-2, 8e-3),
        torch.float16: (2e-3, 2e-3),
    }
}
BENCHMARKS = [
    Case(batch=batch, time=time, heads=4, key=64, value=64, fresh=True) for time, batch in ((512, 8), (4096, 1))
]


def make(case: Case, generator: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
    """The operator's arguments as RWKV-6 makes them."""
    tokens = (case.batch, case.time, case.heads)
    return arguments(case, generator, dtype, decays=(*tokens, case.key))


def arguments(case: Case, generator: torch.Generator, dtype: torch.dtype, decays: tuple[int, ...]) -> dict[str, Any]:
    """The arguments, with `log_w` of shape `decays`."""
    tokens = (case.batch, case.time, case.heads)
    rows = case.batch if case.lengths is None else len(case.lengths)
    wide = torch.promote_types(dtype, torch.float32)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    low, high = case.decay
    raw = low + (high - low) * torch.rand(*decays, generator=generator, dtype=torch.float64)
    state = normal(rows, case.heads, case.value, case.key)
    return {
        "r": normal(*tokens, case.key).to(dtype),
        "log_w": -raw.exp().to(wide),
        "k": (normal(*tokens, case.key) / case.key**0.5).to(dtype),
        "v": normal(*tokens, case.value).to(dtype),
        "u": normal(case.heads, case.key).to(dtype),
        "state": (0 * state if case.fresh else state).to(wide),
        "cu_seqlens": None if case.lengths is None else torch.tensor([0, *accumulate(case.lengths)]),
    }
