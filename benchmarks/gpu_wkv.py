"""The recurrences in Triton on an NVIDIA GPU: milliseconds, TFLOP/s and ratios, in one interleaved run.

    python benchmarks/gpu_wkv.py [wkv4 wkv5 wkv6 wkv7] [--official DIR] [--width 4096] [--batch 1] [--save]

The first rows of an operator are one layer in bfloat16, forward and forward with backward, at 1k to 16k tokens, against
the chunked backend in plain torch (wkv4 has none) and, for wkv6 and wkv7 where it is installed, fla's kernel as its own
layer calls it. `--official DIR` adds RWKV-LM's kernel of wkv7, built from its folder RWKV-v7/train_temp/cuda: given our
decay, from which a few elementwise kernels make what it takes. TFLOP/s count the recurrence for a token and head of N
channels, whatever an algorithm spends: 9 N² forward and 24 N² backward of wkv7, 5 N² and 11 N² of wkv5 and wkv6; that
of wkv4 has so few that its rows count the bytes of inputs, outputs and gradients instead. The last rows are one token a
row, in milliseconds and in the share of the bandwidth that copying the state reaches.
"""

import argparse
import inspect
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from support import Machine, interleaved, report

HEAD = 64
REPEATS = 10
"""Calls between two looks at the clock, so that waiting for the GPU does not count."""
FORWARD, TRAIN = "forward", "forward and backward"
FLOPS = {
    "wkv5": {FORWARD: 5, TRAIN: 16},
    "wkv6": {FORWARD: 5, TRAIN: 16},
    "wkv7": {FORWARD: 9, TRAIN: 33},
}
"""Per token, head and channel squared."""
MOVED = {FORWARD: 3, TRAIN: 9}
"""Tensors [b, t, c] that wkv4 reads or writes: k, v, y; k, v and dy again, dk, dv."""
LEAST_LOG_DECAY = -0.6065306597126334
FLA_SETTINGS = {"chunk_size": 64, "safe_gate": True, "lower_bound": LEAST_LOG_DECAY}
OFFICIAL_CHUNK = 16
"""Tokens between two states that RWKV-LM's kernel keeps for its backward pass."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="*", default=["wkv4", "wkv5", "wkv6", "wkv7"])
    parser.add_argument("--official", metavar="DIR", help="rwkv7_clampw.cu and .cpp of RWKV-LM, to be built and timed")
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(1, "gpu_wkv needs an NVIDIA GPU that torch can use; torch.cuda.is_available() is False\n")
    if given.official:
        build_official(Path(given.official))
    rows = []
    for op in given.ops:
        heads = {"heads": given.width // HEAD, "key": HEAD, "value": HEAD}
        case = cases_of(op).Case(batch=given.batch, fresh=True, **{"channels": given.width} if op == "wkv4" else heads)
        rows += [
            layer(op, replace(case, time=time), direction, given.rounds)
            for time in (1024, 2048, 4096, 8192, 16384)
            for direction in (FORWARD, TRAIN)
        ]
        rows += [decode(op, replace(case, time=1, batch=batch), given.rounds) for batch in (1, 8, 64, 256)]
    machine = Machine(threads=torch.get_num_threads(), device=torch.cuda.get_device_name())
    report("gpu_wkv", rows, machine, save=given.save)


def backends_of(op: str) -> dict[str, Any]:
    return import_module(f"rookery.ops.{op}").OP.backends


def cases_of(op: str) -> Any:
    return import_module(f"rookery.ops.{op}.cases")


def layer(op: str, case: Any, direction: str, rounds: int) -> dict[str, Any]:
    """All contenders on a whole layer."""
    arguments = on_gpu(op, case)
    contenders = {name: x.run for name, x in backends_of(op).items() if name in ("triton", "chunked")}
    if op in FLA and find_spec("fla"):
        contenders["fla"] = FLA[op]
    if op == "wkv7" and hasattr(torch.ops.rwkv7_clampw, "forward"):
        contenders["official"] = official_wkv7
    if len(contenders) > 2:
        check(contenders, arguments)
    seconds = interleaved(
        {name: repeated(call(run, arguments, direction)) for name, run in contenders.items()}, rounds=rounds, warmup=3
    )
    each = {name: seconds.median(name) / REPEATS for name in contenders}
    if op == "wkv4":
        work, unit = MOVED[direction] * arguments["k"].nbytes * 1e-9, "GB/s"
    else:
        work, unit = FLOPS[op][direction] * HEAD**2 * case.batch * case.time * case.heads * 1e-12, "TFLOP/s"
    return {
        "op": op,
        "batch": case.batch,
        "time": case.time,
        "direction": direction,
        "ms": {name: 1e3 * x for name, x in each.items()},
        unit: {name: work / x for name, x in each.items()},
        "triton is faster": {name: seconds.ratio(name, "triton") for name in contenders if name != "triton"},
    }


def decode(op: str, case: Any, rounds: int) -> dict[str, Any]:
    """One token of every row, beside a copy of the state, which moves as many bytes."""
    arguments = on_gpu(op, case)
    state, copy = arguments["state"], torch.empty_like(arguments["state"])
    calls = {"triton": call(backends_of(op)["triton"].run, arguments, FORWARD), "copy": lambda: copy.copy_(state)}
    # captured, because a launch takes longer than a token
    seconds = interleaved({name: repeated(captured(run)) for name, run in calls.items()}, rounds=rounds, warmup=3)
    return {
        "op": op,
        "batch": case.batch,
        "time": 1,
        "direction": "decode",
        "ms": {"triton": 1e3 * seconds.median("triton") / REPEATS},
        "GB/s": 2e-9 * state.nbytes / (seconds.median("triton") / REPEATS),
        "share of a copy's bandwidth": seconds.ratio("copy", "triton"),
    }


def on_gpu(op: str, case: Any) -> dict[str, Any]:
    made = cases_of(op).make(case, torch.Generator().manual_seed(1), torch.bfloat16)
    return {name: x if x is None else x.cuda() for name, x in made.items()}


def call(run: Callable, arguments: dict[str, Any], direction: str) -> Callable[[], Any]:
    if direction == FORWARD:
        return torch.no_grad()(lambda: run(**arguments))
    floats = {name: x.detach().requires_grad_() for name, x in arguments.items() if x is not None}

    def train() -> Any:
        y, _ = run(**(arguments | floats))
        # the official kernel knows no start state
        return torch.autograd.grad(y, list(floats.values()), torch.ones_like(y), allow_unused=True)

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


def fla_wkv7(*, r, log_w, k, v, a, b, state, cu_seqlens=None):
    """fla's kernel on our arguments; its state is [row, head, key, value]."""
    from fla.ops.rwkv7 import chunk_rwkv7

    known = inspect.signature(chunk_rwkv7).parameters
    settings = {name: value for name, value in FLA_SETTINGS.items() if name in known}
    settings |= {"scale": 1.0, "initial_state": state.mT.contiguous(), "output_final_state": True}
    y, last = chunk_rwkv7(r=r, w=log_w, k=k, v=v, a=a, b=b, **settings)
    return y, last.mT


def fla_wkv6(*, r, log_w, k, v, u, state, cu_seqlens=None):
    """fla's kernel on our arguments; its state is [row, head, key, value]."""
    from fla.ops.rwkv6 import chunk_rwkv6

    begin = state.mT.contiguous()
    y, last = chunk_rwkv6(r, k, v, log_w, u, scale=1.0, initial_state=begin, output_final_state=True)
    return y, last.mT


def build_official(folder: Path) -> None:
    """Compiles RWKV-LM's training kernel; torch.ops.rwkv7_clampw has it then. Needs nvcc."""
    from torch.utils.cpp_extension import load

    sources = [folder / name for name in ("rwkv7_clampw.cu", "rwkv7_clampw.cpp")]
    for source in sources:
        if not source.is_file():
            raise SystemExit(f"there is no {source}; --official takes the folder RWKV-v7/train_temp/cuda of RWKV-LM")
    fast = [
        "--use_fast_math",
        "-O3",
        "--extra-device-vectorization",
        f"-D_N_={HEAD}",
        f"-D_CHUNK_LEN_={OFFICIAL_CHUNK}",
    ]
    load(name="rwkv7_clampw", sources=list(map(str, sources)), is_python_module=False, extra_cuda_cflags=fast)


class OfficialWKV7(torch.autograd.Function):
    """r, raw decay, k, v, a, b [b, t, h, n] in bfloat16, t a multiple of 16, from the zero state (core.md 5.3)."""

    @staticmethod
    def forward(ctx, *inputs):
        b, t, h, n = inputs[0].shape
        y = torch.empty_like(inputs[3])
        kept = [inputs[0].new_empty(b, h, t // OFFICIAL_CHUNK, n, n, dtype=torch.float32)]
        kept.append(inputs[0].new_empty(b, t, h, n, dtype=torch.float32))
        torch.ops.rwkv7_clampw.forward(*inputs, y, *kept)
        ctx.save_for_backward(*inputs, *kept)
        return y

    @staticmethod
    def backward(ctx, grad):
        *inputs, states, products = ctx.saved_tensors
        grads = [torch.empty_like(x) for x in inputs]
        torch.ops.rwkv7_clampw.backward(*inputs, grad.contiguous(), states, products, *grads)
        return tuple(grads)


def official_wkv7(*, r, log_w, k, v, a, b, state, cu_seqlens=None):
    """RWKV-LM's kernel on our arguments; it has neither a start state nor an end state."""
    share = (log_w.float() / LEAST_LOG_DECAY).clamp(1e-6, 1 - 1e-6)
    raw = torch.logit(share).to(torch.bfloat16)
    return OfficialWKV7.apply(*(x.contiguous() for x in (r, raw, k, v, a, b))), state


FLA = {"wkv6": fla_wkv6, "wkv7": fla_wkv7}


def check(contenders: dict[str, Callable], arguments: dict[str, Any]) -> None:
    """Refuses to time contenders that compute something else."""
    outputs = {name: run(**arguments)[0].float() for name, run in contenders.items()}
    for name, y in outputs.items():
        error = float((y - outputs["chunked"]).abs().max() / outputs["chunked"].abs().max())
        if error > 0.03:
            raise SystemExit(f"{name} and chunked differ by {error:.1%} of the largest output: not the same call")


if __name__ == "__main__":
    main()
