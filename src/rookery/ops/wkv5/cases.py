"""Calls that tests, benchmarks and `rookery doctor` make of wkv5: those of wkv6, with one decay for all tokens."""

from typing import Any

import torch

from rookery.ops.wkv6.cases import BENCHMARKS, BUDGET, CASES, Case, arguments

__all__ = ["BENCHMARKS", "BUDGET", "CASES", "Case", "make"]


def make(case: Case, generator: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
    """The operator's arguments as RWKV-5 makes them."""
    return arguments(case, generator, dtype, decays=(case.heads, case.key))
