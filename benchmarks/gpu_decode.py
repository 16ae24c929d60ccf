"""Decoding on a GPU with torch: tokens/s of one-token steps in CUDA graphs against the same steps call by call.

    python benchmarks/gpu_decode.py [--random 0.1b 1.5b | --model FILE] [--rows 1 8 64] [--save]

RWKV-7 with random bfloat16 weights of published sizes. A step includes bringing the logits to the host, where tokens
are chosen. At batch 1 the weights' bytes divided by the time of a step are a share of the memory's bandwidth, which
copying a large tensor measures in the same run.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from decode import model_or_random
from support import Machine, interleaved, report

from rookery.engine.runners.torch import TorchRunner
from rookery.families import rwkv7

STEPS = 16
"""Tokens a row between two looks at the clock."""
COPIED = 1 << 30
"""Bytes that are copied to measure the bandwidth."""


def stepping(runner: TorchRunner, rows: int) -> Callable[[], None]:
    """Writes some tokens in so many rows."""
    states = [runner.init_state() for _ in range(rows)]

    def run() -> None:
        for token in range(1, 1 + STEPS):
            runner.forward_rows([[token]] * rows, states, ["last"] * rows)

    return run


def copying(device: str) -> Callable[[], None]:
    """Reads and writes as many bytes as `COPIED` in all."""
    source = torch.empty(COPIED // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def run() -> None:
        target.copy_(source)
        if source.is_cuda:
            torch.cuda.synchronize()

    return run


def measure(name: str, graphs: TorchRunner, given: argparse.Namespace) -> list[dict[str, Any]]:
    eager, table = TorchRunner(graphs.model), []
    eager.steps = None
    read = sum(w.numel() * w.element_size() for key, w in graphs.model.named_parameters() if not key.startswith("emb."))
    for rows in given.rows:
        calls = {"call by call": stepping(eager, rows), "graphs": stepping(graphs, rows), "copy": copying(given.device)}
        seconds = interleaved(calls, rounds=given.rounds, warmup=3)
        low, high = seconds.spread("call by call", "graphs")
        step = seconds.median("graphs") / STEPS
        table.append(
            {
                "model": name,
                "rows": rows,
                "tokens/s": rows / step,
                "call by call tokens/s": rows * STEPS / seconds.median("call by call"),
                "times faster": seconds.ratio("call by call", "graphs"),
                "spread": f"{low:.2f}-{high:.2f}",
                "weights' GB/s": read / step / 1e9,
                "copy GB/s": COPIED / seconds.median("copy") / 1e9,
            }
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--random", nargs="+", choices=[*rwkv7.PRESETS], default=["0.1b"], metavar="SIZE")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cuda", help="another has no graphs: only to see that this runs")
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.exit(1, "gpu_decode needs an NVIDIA GPU that torch can use; torch.cuda.is_available() is False\n")
    table = []
    for size in [None] if given.model else given.random:
        with model_or_random(given.model, size) as path:
            runner = TorchRunner.load(path, device=given.device)
        table += measure(size or given.model, runner, given)
    name = torch.cuda.get_device_name() if given.device == "cuda" else given.device
    report("gpu_decode", table, Machine(threads=torch.get_num_threads(), device=name), save=given.save)


if __name__ == "__main__":
    main()
