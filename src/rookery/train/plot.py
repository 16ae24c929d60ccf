"""Pictures of runs, from their metrics.jsonl."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rookery.checkpoints.atomic import replacing
from rookery.plotting import new_figure

PANELS = (
    ("loss", "loss, nats a token"),
    ("lr", "learning rate"),
    ("grad_norm", "gradient norm"),
    ("tokens_per_second", "tokens a second"),
)
"""What is drawn, and its name."""


def read_metrics(run: str | Path) -> dict[str, np.ndarray]:
    """Columns of a run's metrics.jsonl by name, NaN where a step has none; `run` is the folder or the file.

    A last line that is not whole yet is left out. FileNotFoundError where there is none, ValueError where it is empty.
    """
    path = Path(run)
    path = path / "metrics.jsonl" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"there is no {str(path)!r}; give the folder of a run, its `out`")
    lines = path.read_text(encoding="utf-8").split("\n")
    rows = [json.loads(line) for line in lines[:-1] if line]
    if not rows:
        raise ValueError(f"{path} has no steps yet")
    names = {name: None for row in rows for name in row}
    return {
        name: np.array([math.nan if row.get(name) is None else row[name] for row in rows], np.float64) for name in names
    }


def smoothed(values: np.ndarray, steps: int) -> np.ndarray:
    """Running mean over the last `steps` values, those that are NaN left out."""
    known = np.isfinite(values)
    sums = np.cumsum(np.where(known, values, 0.0))
    counts = np.cumsum(known)
    sums[steps:], counts[steps:] = sums[steps:] - sums[:-steps], counts[steps:] - counts[:-steps]
    return np.where(counts > 0, sums / np.maximum(counts, 1), math.nan)


def plot(runs: Sequence[str | Path], out: str | Path, by: str = "step") -> None:
    """Draws loss, learning rate, gradient norm and speed of `runs` over "step" or "tokens" into the PNG `out`."""
    figure = new_figure(11, 7)
    axes = figure.subplots(2, 2).flatten()
    for number, (name, metrics) in enumerate(zip(_names(runs), map(read_metrics, runs))):
        for axis, (key, _) in zip(axes, PANELS):
            _curve(axis, metrics, key, by, name, f"C{number % 10}")
    for axis, (key, title) in zip(axes, PANELS):
        axis.set_title(title, loc="left", fontsize=11)
        axis.set_xlabel("tokens" if by == "tokens" else "step")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        if key == "grad_norm":
            axis.set_yscale("log")
        elif key != "loss":
            axis.set_ylim(bottom=0)
    axes[0].legend(frameon=False, fontsize=9)
    with replacing(out) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _curve(axis, metrics: dict[str, np.ndarray], key: str, by: str, name: str, color: str) -> None:
    values, places = metrics.get(key, np.empty(0)), metrics[by]
    if len(values) != len(places):
        return
    window = max(1, len(values) // 50)
    if window > 1 and key != "lr":
        axis.plot(places, values, color=color, alpha=0.2, linewidth=0.8)
        values = smoothed(values, window)
    axis.plot(places, values, color=color, linewidth=1.5, label=name)
    held_out = metrics.get("validation_loss")
    if key == "loss" and held_out is not None:
        measured = np.isfinite(held_out)
        axis.plot(places[measured], held_out[measured], "o", color=color, markersize=4, label=f"{name}, held out")


def _names(runs: Sequence[str | Path]) -> list[str]:
    """What the runs are called: their folders, with those above where they would not differ."""
    folders = [path.parent if (path := Path(run)).name == "metrics.jsonl" else path for run in runs]
    for parts in range(1, 10):
        names = ["/".join(folder.resolve().parts[-parts:]) for folder in folders]
        if len(set(names)) == len(names):
            break
    return names
