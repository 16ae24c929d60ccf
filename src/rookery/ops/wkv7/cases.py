"""Calls that tests, benchmarks and `rookery doctor` make of wkv7."""

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
    decay: tuple[float, float] = (-0.6065, 0.0)
    """Bounds of log_w, which is uniform between them; these are RWKV-7's."""
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
    Case(batch=1, time=63, heads=2),
    Case(batch=1, time=64, heads=2, key=64, value=64),
    Case(batch=1, time=65, heads=2, key=16, value=128),
    Case(batch=1, time=300, heads=2, fresh=True),
    Case(batch=1, time=130, heads=1, key=128, value=16),
    Case(batch=1, time=140, heads=2, decay=(-0.6065, -0.606)),
    Case(batch=1, time=140, heads=2, decay=(-0.002, 0.0)),
    Case(batch=3, time=0),
    Case(batch=1, time=101, heads=2, lengths=(0, 33, 0, 0, 1, 64, 3, 0)),
    Case(batch=1, time=0, lengths=(0, 0)),
    Case(batch=3, time=21, key=8, value=5),
    Case(batch=1, time=33, heads=2, key=12, value=40),
]
# Triton multiplies what it has of chunks of tokens in the inputs' precision (float16 in tf32), as others do on GPUs
BUDGET = {
    "triton": {
        torch.float64: (1e-9, 1e-12),
        torch.float32: (1e-5, 3e-6),
        torch.bfloat16: (1e-2, 8e-3),
        torch.float16: (2e-3, 2e-3),
    }
}
BENCHMARKS = [
    Case(batch=batch, time=time, heads=4, key=64, value=64, fresh=True)
    for batch, time in ((1, 512), (8, 512), (1, 4096))
]


def make(case: Case, generator: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
    """The operator's arguments as RWKV-7 makes them: `a` is a unit vector −κ̂ and `b` is κ̂ times a rate in (0, 1)."""
    tokens = (case.batch, case.time, case.heads)
    rows = case.batch if case.lengths is None else len(case.lengths)
    wide = torch.promote_types(dtype, torch.float32)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    def uniform(lowest: float, highest: float) -> torch.Tensor:
        drawn = torch.rand(*tokens, case.key, generator=generator, dtype=torch.float64)
        return lowest + (highest - lowest) * drawn

    removal = torch.nn.functional.normalize(normal(*tokens, case.key), dim=-1)
    state = normal(rows, case.heads, case.value, case.key)
    return {
        "r": normal(*tokens, case.key).to(dtype),
        "log_w": uniform(*case.decay).to(wide),
        "k": (normal(*tokens, case.key) / case.key**0.5).to(dtype),
        "v": normal(*tokens, case.value).to(dtype),
        "a": -removal.to(dtype),
        "b": (removal * uniform(0, 1)).to(dtype),
        "state": (0 * state if case.fresh else state).to(wide),
        "cu_seqlens": None if case.lengths is None else torch.tensor([0, *accumulate(case.lengths)]),
    }
