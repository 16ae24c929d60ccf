"""Runs that follow each other, each going on from the model that the one before has written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rookery.errors import unknown
from rookery.train.checkpoint import newest_step
from rookery.train.config import FinetuneConfig, TrainConfig, overlay

Stage = tuple[str, TrainConfig]
"""A stage's name and run."""
MODEL = "model.safetensors"


def staged(
    stages: Mapping[str, TrainConfig],
    values: Mapping[str, Any],
    *,
    chosen: Sequence[str] = (),
    own_data: Sequence[str] = (),
) -> list[Stage]:
    """The stages with `values` overlaid, each in a numbered folder of `out` and starting where the last one ends.

    A key that names a stage ("align") holds settings of that stage alone; any other is for all stages that know it.
    `chosen` stages alone run, if any are named; those of `own_data` are left out unless `values` give them a data.path.
    UnknownName for a key that no stage knows.
    """
    values = dict(values)
    own = {name: values.pop(name) for name in stages if isinstance(values.get(name), dict)}
    for name in chosen:
        if name not in stages:
            raise unknown("stage", name, stages, "`rookery distill --help`")
    left_out = [name for name in own_data if not own.get(name, {}).get("data", {}).get("path")]
    names = [name for name in stages if (name in chosen if chosen else name not in left_out)]
    known = {key for config in stages.values() for key in vars(config)}
    for key in values:
        if key not in known:
            raise unknown("setting", key, [*known, *stages], "`rookery distill NAME --dry-run`")
    out = Path(values.pop("out", Path(stages[names[0]].out).parent))
    found: list[Stage] = []
    for name in names:
        config = stages[name]
        shared = {key: value for key, value in values.items() if hasattr(config, key)}
        if name in own_data:
            shared.pop("data", None)
        config = overlay(overlay(config, shared), own.get(name, {}))
        number = 1 + list(stages).index(name)
        config = replace(config, out=str(out / f"{number}-{name}"))
        found.append((name, _after(config, found[-1][1].out) if found else config))
    return found


def _after(config: TrainConfig, out: str) -> TrainConfig:
    model = str(Path(out) / MODEL)
    return replace(config, **({"base": model} if isinstance(config, FinetuneConfig) else {"student": model}))


def is_finished(config: TrainConfig) -> bool:
    """Whether the run in `config.out` has taken all its steps and written its model."""
    out = Path(config.out)
    return (out / MODEL).is_file() and newest_step(out / "checkpoints") >= config.steps
