"""wkv7 in Triton on an NVIDIA GPU: milliseconds, TFLOP/s and ratios, in one interleaved run.

    python benchmarks/gpu_wkv7.py [--width 4096] [--batch 1] [--rounds 15] [--save]

The first rows are one layer in bfloat16, forward and forward with backward, at 1k to 16k tokens, against the chunked
backend in plain torch and, where it is installed, fla's `chunk_rwkv7` as its own layer calls it. TFLOP/s count the
recurrence, 9 N² forward and 24 N² backward a token and head of N channels, whatever an algorithm spends. The last rows
are one token a row, in milliseconds and in the share of the bandwidth that copying the state reaches.
"""

import argparse
import inspect
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch
from support import Machine, interleaved, report

from rookery.ops.wkv7 import OP
from rookery.ops.wkv7.cases import Case, make

HEAD = 64
REPEATS = 10
"""Calls between two looks at the clock, so that waiting for the GPU does not count."""
FLOPS = {"forward": 9, "forward and backward": 33}
"""Per token, head and channel squared."""
FLA_SETTINGS = {"chunk_size": 64, "safe_gate": True, "lower_bound": -0.6065306597126334}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(1, "gpu_wkv7 needs an NVIDIA GPU that torch can use; torch.cuda.is_available() is False\n")
    case = Case(batch=given.batch, heads=given.width // HEAD, key=HEAD, value=HEAD, fresh=True)
    rows = [
        layer(replace(case, time=time), direction, given.rounds)
        for time in (1024, 2048, 4096, 8192, 16384)
        for direction in FLOPS
    ]
    rows += [decode(replace(case, time=1, batch=batch), given.rounds) for batch in (1, 8, 64, 256)]
    machine = Machine(threads=torch.get_num_threads(), device=torch.cuda.get_device_name())
    report("gpu_wkv7", rows, machine, save=given.save)


def layer(case: Case, direction: str, rounds: int) -> dict[str, Any]:
    """All contenders on a whole layer."""
    arguments = on_gpu(case)
    contenders = {name: OP.backends[name].run for name in ("triton", "chunked")}
    if find_spec("fla"):
        contenders["fla"] = fla
        check(contenders, arguments)
    seconds = interleaved(
        {name: repeated(call(run, arguments, direction)) for name, run in contenders.items()}, rounds=rounds, warmup=3
    )
    flops = FLOPS[direction] * HEAD**2 * case.batch * case.time * case.heads
    return {
        "batch": case.batch,
        "time": case.time,
        "direction": direction,
        "ms": {name: 1e3 * seconds.median(name) / REPEATS for name in contenders},
        "TFLOP/s": {name: 1e-12 * flops / (seconds.median(name) / REPEATS) for name in contenders},
        "triton is faster": {name: seconds.ratio(name, "triton") for name in contenders if name != "triton"},
    }


def decode(case: Case, rounds: int) -> dict[str, Any]:
    """One token of every row, beside a copy of the state, which moves as many bytes."""
    arguments = on_gpu(case)
    state, copy = arguments["state"], torch.empty_like(arguments["state"])
    calls = {"triton": call(OP.backends["triton"].run, arguments, "forward"), "copy": lambda: copy.copy_(state)}
    # captured, because a launch takes longer than a token
    seconds = interleaved({name: repeated(captured(run)) for name, run in calls.items()}, rounds=rounds, warmup=3)
    return {
        "batch": case.batch,
        "time": 1,
        "direction": "decode",
        "ms": {"triton": 1e3 * seconds.median("triton") / REPEATS},
        "GB/s": 2e-9 * state.nbytes / (seconds.median("triton") / REPEATS),
        "share of a copy's bandwidth": seconds.ratio("copy", "triton"),
    }


def on_gpu(case: Case) -> dict[str, Any]:
    made = make(case, torch.Generator().manual_seed(1), torch.bfloat16)
    return {name: x if x is None else x.cuda() for name, x in made.items()}


def call(run: Callable, arguments: dict[str, Any], direction: str) -> Callable[[], Any]:
    if direction == "forward":
        return torch.no_grad()(lambda: run(**arguments))
    floats = {name: x.detach().requires_grad_() for name, x in arguments.items() if x is not None}

    def train() -> Any:
        y, _ = run(**(arguments | floats))
        return torch.autograd.grad(y, list(floats.values()), torch.ones_like(y))

    return train


def repeated(run: Callable[[], Any]) -> Callable[[], None]:
    def many() -> None:
        for _ in range(REPEATS):
            run()
        torch.cuda.synchronize()

    return many


def captured(run: Callable[[], Any]) -> Callable[[], None]:
    run()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def fla(*, r, log_w, k, v, a, b, state, cu_seqlens=None):
    """fla's kernel on our arguments; its state is [row, head, key, value]."""
    from fla.ops.rwkv7 import chunk_rwkv7

    known = inspect.signature(chunk_rwkv7).parameters
    settings = {name: value for name, value in FLA_SETTINGS.items() if name in known}
    settings |= {"scale": 1.0, "initial_state": state.mT.contiguous(), "output_final_state": True}
    y, last = chunk_rwkv7(r=r, w=log_w, k=k, v=v, a=a, b=b, **settings)
    return y, last.mT


def check(contenders: dict[str, Callable], arguments: dict[str, Any]) -> None:
    """Refuses to time contenders that compute something else."""
    outputs = {name: run(**arguments)[0].float() for name, run in contenders.items()}
    for name, y in outputs.items():
        error = float((y - outputs["chunked"]).abs().max() / outputs["chunked"].abs().max())
        if error > 0.03:
            raise SystemExit(f"{name} and chunked differ by {error:.1%} of the largest output: not the same call")


if __name__ == "__main__":
    main()
