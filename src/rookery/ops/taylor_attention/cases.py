"""Calls that tests, benchmarks and `rookery doctor` make of taylor_attention."""

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from rookery.ops.taylor_attention.features import features


@dataclass(frozen=True)
class Case:
    """A call: sizes, and the lengths of the documents where they are packed in one row."""

    batch: int = 2
    time: int = 5
    heads: int = 3
    key: int = 6
    value: int = 10
    fresh: bool = False
    """The state before the first token is zero."""
    lengths: tuple[int, ...] | None = None


CASES = [
    Case(time=1),
    Case(),
    Case(batch=1, time=1, heads=1, key=16, value=64),
    Case(batch=3, time=1, heads=2, key=1, value=7),
    Case(batch=1, time=1, heads=2, key=24, value=112),
    Case(batch=1, time=128, heads=1, key=16, value=3, fresh=True),
    Case(batch=1, time=300, heads=2, key=8, value=16),
    Case(batch=3, time=0),
    Case(batch=1, time=160, heads=2, lengths=(0, 130, 0, 1, 29)),
    Case(batch=1, time=0, lengths=(0, 0)),
]
# the denominators cancel most of what the parts of a gradient add up to
BUDGET = {
    "chunked": {torch.float32: (1e-5, 1e-5), torch.bfloat16: (4e-3, 1e-5)},
    "native": {torch.float32: (1e-5, 1e-5), torch.bfloat16: (4e-3, 1e-5)},
    "triton": {torch.float32: (1e-5, 1e-5), torch.bfloat16: (4e-3, 1e-5)},
}
BENCHMARKS = [Case(batch=16, time=1, heads=16, key=16, value=64), Case(batch=1, time=2048, heads=4, key=16, value=64)]


def make(case: Case, generator: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
    """The operator's arguments; a state that is not fresh has read seven tokens."""
    rows = case.batch if case.lengths is None else len(case.lengths)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    before = features(normal(rows, 7, case.heads, case.key))
    values = torch.cat([normal(rows, 7, case.heads, case.value), before.new_ones(rows, 7, case.heads, 1)], dim=-1)
    state = torch.einsum("rthv,rthf->rhvf", values, before)
    tokens = (case.batch, case.time, case.heads)
    return {
        "q": normal(*tokens, case.key).to(dtype),
        "k": normal(*tokens, case.key).to(dtype),
        "v": normal(*tokens, case.value).to(dtype),
        "state": (0 * state if case.fresh else state).to(torch.promote_types(dtype, torch.float32)),
        "cu_seqlens": None if case.lengths is None else torch.tensor([0, *accumulate(case.lengths)]),
    }
