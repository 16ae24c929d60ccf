"""How many times faster the compiled recurrences of RWKV-4 to 7 are than plain loops, on one thread, interleaved.

    python benchmarks/recurrences.py [--save]

The plain loops, benchmarks/recurrences.c, are compiled here with `cc -O3 -march=native -ffast-math`: tokens outside,
the state row by row in memory, inner loops vectorised by the compiler. Both results are compared before anything is
timed. 512 tokens of 4 heads of 64 (256 channels for RWKV-4), float32; "training" is forward and backward. Times are
those that the thread computes: other work on the machine matters little.
"""

import argparse
import ctypes
import importlib
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from support import Machine, interleaved, report
from torch import Tensor

SOURCE = Path(__file__).with_suffix(".c")
FLAGS = ["-O3", "-march=native", "-ffast-math", "-fPIC", "-c"]
ORDER = {
    "wkv4": ["log_w", "u", "k", "v"],
    "wkv5": ["r", "log_w", "k", "v", "u"],
    "wkv6": ["r", "log_w", "k", "v", "u"],
    "wkv7": ["r", "log_w", "k", "v", "a", "b"],
}
"""Inputs in the order of the plain loops' parameters."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        compiled, library = Path(folder) / "recurrences.o", Path(folder) / "recurrences.so"
        subprocess.run(["cc", *FLAGS, SOURCE, "-o", compiled], check=True)
        # linked without -ffast-math, which would change the whole process's arithmetic
        subprocess.run(["cc", "-shared", compiled, "-o", library, "-lmvec", "-lm"], check=True)
        loops = ctypes.CDLL(str(library))
        rows = [row(loops, name, trains, given) for name in ORDER for trains in (False, True)]
    report("recurrences", rows, Machine(threads=1), save=given.save)


def row(loops: ctypes.CDLL, name: str, trains: bool, given: argparse.Namespace) -> dict:
    """Microseconds for one token of one head (or of 64 channels), and the ratio."""
    arguments = inputs(name, given.tokens)
    calls = {"plain": plain(loops, name, arguments, trains), "native": native(name, arguments, trains)}
    for mine, theirs in zip(calls["native"](), calls["plain"](), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)
    seconds = interleaved(calls, rounds=given.rounds, clock=time.thread_time)
    low, high = seconds.spread("plain", "native")
    return {
        "recurrence": name,
        "direction": "training" if trains else "forward",
        "µs a head-token": {label: 1e6 * seconds.median(label) / (4 * given.tokens) for label in calls},
        "native is faster": seconds.ratio("plain", "native"),
        "spread": [low, high],
    }


def inputs(name: str, tokens: int) -> dict[str, Tensor]:
    """float32 arguments of one sequence, its state new."""
    cases = importlib.import_module(f"rookery.ops.{name}.cases")
    shape = {"channels": 256} if name == "wkv4" else {"heads": 4, "key": 64, "value": 64}
    case = cases.Case(batch=1, time=tokens, fresh=True, **shape)
    made = cases.make(case, torch.Generator().manual_seed(1), torch.float32)
    return {key: made[key].contiguous() for key in [*ORDER[name], "state"]}


def native(name: str, arguments: dict[str, Tensor], trains: bool) -> Callable[[], list[Tensor]]:
    """Gives y, and with `trains` the gradients of Σ y by the inputs."""
    run = importlib.import_module(f"rookery.ops.{name}").OP.backends["native"].run
    leaves = {key: arguments[key].clone().requires_grad_() for key in ORDER[name]}

    def forward() -> list[Tensor]:
        with torch.no_grad():
            return [run(**arguments, cu_seqlens=None)[0]]

    def train() -> list[Tensor]:
        y = run(**leaves, state=arguments["state"], cu_seqlens=None)[0]
        return [y.detach(), *torch.autograd.grad(y, list(leaves.values()), torch.ones_like(y))]

    return train if trains else forward


def plain(loops: ctypes.CDLL, name: str, arguments: dict[str, Tensor], trains: bool) -> Callable[[], list[Tensor]]:
    """The same by the plain loops."""
    kind = "wkv6" if name == "wkv5" else name
    run = getattr(loops, f"{kind}_{'train' if trains else 'forward'}")
    tokens, width = arguments["v"].shape[1], arguments["v"][0, 0].numel()
    sizes = [tokens, width] if name == "wkv4" else [tokens, width // 64, 64]
    y, grads = torch.empty_like(arguments["v"]), [torch.empty_like(arguments[key]) for key in ORDER[name]]
    ones = torch.ones_like(y)

    def call() -> list[Tensor]:
        state = arguments["state"].clone()
        given: list[int | Tensor] = [*sizes, *(arguments[key] for key in ORDER[name]), state, y]
        if kind == "wkv6":  # where the next token's decays are
            given.insert(len(sizes) + 2, 0 if name == "wkv5" else width)
        given += [ones, *grads] if trains else [torch.empty(0)] if name == "wkv4" else []
        run(*(ctypes.c_void_p(x.data_ptr() or None) if isinstance(x, Tensor) else ctypes.c_long(x) for x in given))
        return [y, *grads] if trains else [y]

    return call


if __name__ == "__main__":
    main()
