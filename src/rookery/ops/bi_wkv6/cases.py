"""Calls that tests, benchmarks and `rookery doctor` make of bi_wkv6: short ones of wkv6, without states."""

from typing import Any

import torch

from rookery.ops.wkv6.cases import Case, arguments

CASES = [
    Case(),
    Case(batch=1, time=1, heads=1, key=16, value=48),
    Case(batch=3, time=2, heads=2, value=80),
    Case(time=17, key=48, value=32),
    Case(batch=1, time=70, heads=2),
    Case(batch=1, time=40, heads=2, decay=(-12.0, 8.0)),
    Case(batch=3, time=0),
    Case(batch=3, time=21, key=8, value=5),
]
BUDGET = {"scans": {torch.bfloat16: (1.2e-2, 4e-3), torch.float16: (2e-3, 2e-3)}}
BENCHMARKS = [Case(batch=1, time=time, heads=3, key=64, value=64) for time in (196, 1024, 4096)]


def make(case: Case, generator: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
    """The operator's arguments as Vision-RWKV6 makes them."""
    call = arguments(case, generator, dtype, decays=(case.batch, case.time, case.heads, case.key))
    return {name: call[name] for name in ("r", "log_w", "k", "v", "u")}
