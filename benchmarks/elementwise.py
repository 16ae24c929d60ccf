"""The compiled element-wise operators and head against their definitions in plain torch, in one interleaved run.

    python benchmarks/elementwise.py --save

Each call is a forward and a backward pass of the operator's benchmark cases (`rookery.ops.NAME.cases`).
"""

import argparse
import importlib
from collections.abc import Callable
from typing import Any

import torch
from support import Machine, interleaved, report

OPS = {
    "token_shift": ("native", "reference"),
    "wkv7_inputs": ("native", "reference"),
    "wkv7_output": ("native", "reference"),
    "relu_squared": ("native", "reference"),
    "linear_cross_entropy": ("native", "chunked", "reference"),
}


def calls(op: str, case: Any, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """Forward and backward of every backend on the same arguments."""
    package = importlib.import_module(f"rookery.ops.{op}")
    cases = importlib.import_module(f"rookery.ops.{op}.cases")
    arguments = cases.make(case, torch.Generator().manual_seed(0), dtype)
    leaves = [x.requires_grad_() for x in arguments.values() if torch.is_tensor(x) and x.is_floating_point()]
    weights: list[torch.Tensor] = []

    def call(backend: str) -> Callable[[], Any]:
        def run() -> Any:
            given = package.OP(backend=backend, **arguments)
            given = given if isinstance(given, tuple) else (given,)
            if not weights:
                weights.extend(torch.ones_like(x) for x in given)
            return torch.autograd.grad(given, leaves, weights)

        return run

    return {backend: call(backend) for backend in OPS[op]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    rows = []
    for op, backends in OPS.items():
        for case in importlib.import_module(f"rookery.ops.{op}.cases").BENCHMARKS:
            for dtype in (torch.bfloat16, torch.float32):
                seconds = interleaved(calls(op, case, dtype), rounds=given.rounds)
                low, high = seconds.spread("reference", "native")
                rows.append(
                    {
                        "op": op,
                        "dtype": str(dtype).removeprefix("torch."),
                        "ms": {name: 1e3 * seconds.median(name) for name in backends},
                        "reference / native": {"median": seconds.ratio("reference", "native"), "from": low, "to": high},
                    }
                )
    report("elementwise", rows, Machine(threads=given.threads), save=given.save)


if __name__ == "__main__":
    main()
