"""Calls that tests, benchmarks and `rookery doctor` make of chunk_attention."""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Case:
    """A call: sizes, and for every row the entries before it and the new ones."""

    before: tuple[int, ...] = (13, 6)
    new: tuple[int, ...] = (5, 2)
    heads: int = 3
    dim: int = 8
    chunk_size: int = 4
    topk: int = 3
    slack: int = 0
    """Places beyond the rows' entries, filled with what must not be read."""


CASES = [
    Case(),
    Case(before=(9,), new=(1,), heads=2),
    Case(before=(12, 0, 7), new=(1, 1, 1), slack=2),
    Case(before=(0,), new=(17,), heads=2),
    Case(before=(0, 9), new=(9, 0), dim=5),
    Case(before=(21,), new=(2,), topk=1),
    Case(before=(21,), new=(1,), topk=2),
    Case(before=(5,), new=(12,), topk=9),
    Case(before=(40,), new=(3,), chunk_size=8, topk=4, dim=16),
    Case(before=(6, 3), new=(4, 2), chunk_size=1, topk=4),
]
# softmax weights round in the inputs' precision; a query's gradient is a small difference of large terms
_SOFTMAX = {torch.float32: (1e-5, 2e-5), torch.bfloat16: (1e-2, 2e-2)}
BUDGET = dict.fromkeys(("gathered", "masked", "reference"), _SOFTMAX)
BENCHMARKS = [
    Case(before=(entries,), new=(new,), heads=12, dim=64, chunk_size=256)
    for entries, new in ((8000, 1), (64000, 1), (0, 2048))
]


def make(case: Case, generator: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
    """The operator's arguments as a cache makes them."""
    rows, size = len(case.before), case.chunk_size

    def normal(length: int) -> torch.Tensor:
        return torch.randn(rows, length, case.heads, case.dim, generator=generator, dtype=torch.float64).to(dtype)

    before, new = torch.tensor(case.before), torch.tensor(case.new)
    base = before // size * size
    past = int(base.max()) + case.slack * size
    later, queries = int((before + new - base).max()) + case.slack, max(case.new)
    past_k, k = normal(past), normal(later)
    wide = torch.promote_types(dtype, torch.float32)
    chunks = []
    for row, start in enumerate(base.tolist()):
        entries = torch.cat([past_k[row, :start], k[row]]).to(wide)[: case.before[row] + case.new[row]]
        whole = entries[: len(entries) // size * size].unflatten(0, (-1, size)).mean(dim=1)
        chunks.append(whole)
    means = torch.full((rows, max(map(len, chunks)) + case.slack, case.heads, case.dim), 9.0, dtype=wide)
    for row, whole in enumerate(chunks):
        means[row, : len(whole)] = whole
    places = torch.arange(queries)
    return {
        "q": normal(queries) * 2,
        "past_k": past_k,
        "past_v": normal(past),
        "means": means,
        "k": k,
        "v": normal(later),
        "base": base,
        "positions": torch.where(places < new[:, None], before[:, None] + places, -1),
        "chunk_size": size,
        "topk": case.topk,
    }
