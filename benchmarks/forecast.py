"""A forecaster on RWKV-7 beside a transformer of its size, by length: a training step, and a stream's time and bytes.

    python benchmarks/forecast.py [--patches 7168] [--points 1000000] [--rounds 5] [--pushes 60] [--save]

The models are those of `rookery reproduce rimer` (two blocks of width 64, patches of 24 points, 139,000 parameters). A
training step, forward and backward, reads `--patches` patches in all, as many series as that makes of 14, 28, ... of
them. The streams have read up to `--points` values; then one more patch at a time is pushed into each in turn. Times
are the shortest of the rounds, ratios the medians. `--save` writes forecast.json and .png to benchmarks/results.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from support import RESULTS, Machine, interleaved, report

from rookery.checkpoints.atomic import replacing
from rookery.reproduce.rimer import arms, opened
from rookery.train.tasks.forecast import forecast_loss

NAMES = {"rimer": "RWKV-7", "transformer": "transformer"}
PATCH = 24
SHORTEST = 14
"""Patches of the standard lookback, 336 hours."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patches", type=int, default=7168, help="of a training step, all series together")
    parser.add_argument("--points", type=int, default=1_000_000, help="the longest history of a stream")
    parser.add_argument("--rounds", type=int, default=5, help="training steps of each contender and length")
    parser.add_argument("--pushes", type=int, default=60, help="patches pushed into every stream")
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    steps = [step(length, given.patches // length, given.rounds) for length in doubled(SHORTEST, given.patches)]
    streams = streaming([PATCH * n for n in doubled(SHORTEST, given.points // PATCH, times=4)], given.pushes)
    faster = [row["patches of a series"] for row in steps if row["how many times faster"] >= 1]
    print(f"a training step is faster from {faster[0]} patches on" if faster else "the transformer's step is faster")
    report("forecast", [*steps, *streams], Machine(threads=1), save=given.save)
    if given.save:
        with replacing(RESULTS / "forecast.png") as path:
            draw(steps, streams, path)


def doubled(first: int, last: int, times: int = 2) -> list[int]:
    """`first`, `times` as much, and so on, none above `last`."""
    found = [first]
    while found[-1] * times <= last:
        found.append(found[-1] * times)
    return found


def step(length: int, series: int, rounds: int) -> dict[str, Any]:
    """Forward and backward over so many series of `length` patches: milliseconds, and RWKV-7's speed by the other's."""
    windows = torch.randn(series, (length + 4) * PATCH, generator=torch.Generator().manual_seed(0))
    models = {name: model.train() for name, model in contenders().items()}
    calls = {
        name: lambda model=model: forecast_loss(model, windows, length * PATCH).backward()
        for name, model in models.items()
    }
    seconds = interleaved(calls, rounds=rounds)
    return {
        "measured": "training step",
        "patches of a series": length,
        "series": series,
        "ms": {name: 1000 * seconds.best(name) for name in calls},
        "how many times faster": seconds.ratio("transformer", "rimer"),
        "from, to": list(seconds.spread("transformer", "rimer")),
    }


def streaming(lengths: list[int], pushes: int) -> list[dict[str, Any]]:
    """Bytes after so many points of history, and milliseconds of a patch pushed after them."""
    models = {name: model.eval() for name, model in contenders().items()}
    streams = {(name, length): opened(model, length) for length in lengths for name, model in models.items()}
    sizes = {key: stream.state_bytes for key, stream in streams.items()}
    patch = np.sin(np.arange(PATCH) / 4)
    seconds = interleaved({key: lambda s=s: s.push(patch) for key, s in streams.items()}, rounds=pushes, warmup=3)
    return [
        {
            "measured": "stream",
            "points of history": length,
            "bytes": {name: sizes[name, length] for name in models},
            "ms": {name: 1000 * seconds.best((name, length)) for name in models},
            "how many times faster": seconds.ratio(("transformer", length), ("rimer", length)),
        }
        for length in lengths
    ]


def contenders() -> dict[str, torch.nn.Module]:
    """Both models, untrained."""
    return {arm.name: arm.create(0) for arm in arms(96) if arm.name in NAMES}


def draw(steps: list[dict[str, Any]], streams: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.8), layout="constrained")
    sizes, times, training = figure.subplots(1, 3)
    points = [row["points of history"] for row in streams]
    for name, label in NAMES.items():
        sizes.loglog(points, [row["bytes"][name] for row in streams], marker="o", label=label)
        times.loglog(points, [row["ms"][name] for row in streams], marker="o")
    sizes.set(xlabel="points of history", ylabel="bytes of state", title="memory of one series")
    times.set(xlabel="points of history", ylabel="ms", title="time of one more patch")
    sizes.legend(frameon=False)
    lengths = [row["patches of a series"] for row in steps]
    training.semilogx(lengths, [row["how many times faster"] for row in steps], marker="o")
    training.axhline(1, color="0.6", linewidth=1)
    training.set(xlabel="patches of a series", title="training speed, RWKV-7 / transformer", ylim=(0, None))
    figure.savefig(path, dpi=110, format="png")


if __name__ == "__main__":
    main()
