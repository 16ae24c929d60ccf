"""Milliseconds of wkv7 by backend, forward and forward with backward, in one interleaved run.

    python benchmarks/wkv7.py [--save]

Heads of 64 × 64, on the calls that src/rookery/ops/wkv7/cases.py lists. The definition runs where its graph, a state a
token, fits into memory. The last rows are the compiled backend on one thread with each instruction set that the machine
has, in microseconds for one token of one head.
"""

import argparse
from collections.abc import Callable

import torch
from support import Machine, interleaved, report

from rookery.ops.dispatch import native_module
from rookery.ops.wkv7 import OP
from rookery.ops.wkv7.cases import BENCHMARKS, Case, make

REFERENCE_TOKENS = 512
FORWARD, TRAIN = "forward", "forward and backward"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=native_module().available_cores())
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    rows = []
    torch.set_num_threads(given.threads)
    for case in BENCHMARKS:
        for dtype in (torch.float32, torch.bfloat16):
            for direction in (FORWARD, TRAIN):
                rows.append(backends(case, dtype, direction, given.rounds))
    torch.set_num_threads(1)
    for direction in (FORWARD, TRAIN):
        rows.append(instruction_sets(BENCHMARKS[0], direction, given.rounds))
    report("wkv7", rows, Machine(threads=given.threads), save=given.save)


def backends(case: Case, dtype: torch.dtype, direction: str, rounds: int) -> dict:
    """Every backend that can run the call, and how many times faster the compiled one is."""
    arguments = make(case, torch.Generator().manual_seed(1), dtype)
    calls = {
        name: call(backend.run, arguments, direction)
        for name, backend in OP.backends.items()
        if backend.why_not(**arguments) is None and (name != "reference" or case.batch * case.time <= REFERENCE_TOKENS)
    }
    seconds = interleaved(calls, rounds=rounds)
    others = [name for name in calls if name != "native"]
    return {
        "batch": case.batch,
        "time": case.time,
        "dtype": str(dtype).removeprefix("torch."),
        "direction": direction,
        "ms": {name: 1e3 * seconds.median(name) for name in calls},
        "native is faster": {name: seconds.ratio(name, "native") for name in others},
    }


def instruction_sets(case: Case, direction: str, rounds: int) -> dict:
    """Microseconds of one head-token on one thread."""
    arguments = make(case, torch.Generator().manual_seed(1), torch.float32)
    run = OP.backends["native"].run
    calls = {isa: call(run, arguments, direction, isa=isa) for isa in native_module().available_isas()}
    seconds = interleaved(calls, rounds=rounds)
    head_tokens = case.batch * case.time * case.heads
    return {
        "batch": case.batch,
        "time": case.time,
        "dtype": "float32",
        "direction": direction,
        "µs a head-token, one thread": {isa: 1e6 * seconds.median(isa) / head_tokens for isa in calls},
    }


def call(run: Callable, arguments: dict, direction: str, **options: str) -> Callable[[], object]:
    if direction == FORWARD:
        return torch.no_grad()(lambda: run(**arguments, **options))
    floats = {name: x.requires_grad_() for name, x in arguments.items() if x is not None and x.is_floating_point()}

    def train() -> object:
        y, _ = run(**(arguments | floats), **options)
        return torch.autograd.grad(y.sum(), list(floats.values()))

    return train


if __name__ == "__main__":
    main()
