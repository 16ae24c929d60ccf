"""The training loop: batch, loss, step, log, save. The same call continues what it finds in the run's folder."""

import dataclasses
import importlib
import json
import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rookery.errors import RookeryError
from rookery.train.checkpoint import load_checkpoint, save_checkpoint
from rookery.train.config import TrainConfig
from rookery.train.optim import Optimizer, learning_rate
from rookery.train.tasks.base import Task
from rookery.train.track import Console, Metrics

MAY_CHANGE = {"out", "steps", "save_every", "keep", "validate_every", "threads", "merge"}
"""Settings that a resumed run may have other than the run it continues."""


class TrainingFailed(RookeryError, RuntimeError):
    """The run cannot go on; its checkpoints are kept."""


@dataclass(frozen=True)
class Result:
    """How a run ended."""

    step: int
    """Steps done, earlier calls included."""
    loss: float
    """Of the last step."""
    signal: int | None
    """The signal that ended it early, None if it ran to its end."""


@dataclass
class Run:
    """Everything that a step touches."""

    config: TrainConfig
    task: Task
    optimizer: Optimizer
    step: int = 0
    loss: float = math.nan
    tokens: int = 0


def train(config: TrainConfig) -> Result:
    """Trains as `config` says, or continues the run in `config.out`.

    Writes metrics.jsonl, checkpoints/ and, at the end, model.safetensors. Ctrl-C and SIGTERM save a checkpoint after
    the current step and return. Raises TrainingFailed if the loss is not finite or the folder holds another run.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    run = prepare(config)
    run.task.ready(out)
    resume(run, out)
    metrics = Metrics(out / "metrics.jsonl", run.step)
    with stop_requests() as asked, Console(config.steps, run.step) as console:
        try:
            loop(run, metrics, console, asked, out)
        finally:
            metrics.close()
    if run.step == config.steps:
        run.task.export(out)
    return Result(run.step, run.loss, asked[0] if asked else None)


def prepare(config: TrainConfig) -> Run:
    """Model, optimiser and data of a run that has not begun."""
    module, _, name = config.task.partition(":")
    task = getattr(importlib.import_module(module), name)(config)
    return Run(config, task, Optimizer(task.trained, config.optim, task.dtype))


def resume(run: Run, out: Path) -> None:
    """Takes over the newest checkpoint in the run's folder, if there is one."""
    found = load_checkpoint(out / "checkpoints")
    if found is None:
        return
    here, there = (_comparable(c) for c in (dataclasses.asdict(run.config), json.loads(found["config"])))
    differing = [key for key in here if here[key] != there.get(key)]
    if differing:
        raise TrainingFailed(
            f"{str(out)!r} holds a run with other settings ({', '.join(differing)}); "
            "choose another out folder or restore them"
        )
    run.optimizer.load_state_dict(found["optimizer"])
    run.step, run.loss, run.tokens = found["step"], found["loss"], found["tokens"]


def _comparable(config: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps({key: value for key, value in config.items() if key not in MAY_CHANGE}))


def loop(run: Run, metrics: Metrics, console: Console, asked: list[int], out: Path) -> None:
    """Steps until the run ends or a stop is asked for; saves on the way and at the end."""
    config = run.config
    saved, began = run.step, run.step
    start = time.perf_counter()
    while run.step < config.steps and not asked:
        before = time.perf_counter()
        step = run.step + 1
        batch = run.task.batch(step)
        found = run.task.loss(batch)
        found["loss"].backward()
        logged = {name: value.item() for name, value in found.items()}
        if not math.isfinite(logged["loss"]):
            raise TrainingFailed(
                f"the loss of step {step} is {logged['loss']}; the last checkpoint is of step {saved}. Lower optim.lr"
            )
        rate = learning_rate(config.optim, step, config.steps)
        norm = run.optimizer.step(rate)
        run.task.after_step()
        tokens = run.task.tokens(batch)
        run.step, run.loss, run.tokens = step, logged["loss"], run.tokens + tokens
        now = time.perf_counter()
        speed = tokens / (now - before)
        row = {**logged, "lr": rate, "tokens": run.tokens, "tokens_per_second": speed, "grad_norm": norm}
        if config.validate_every and (step % config.validate_every == 0 or step == config.steps):
            row |= run.task.validate()
            if "validation_loss" in row:
                console.say(f"step {step}: held-out loss {row['validation_loss']:.4f}")
        metrics.write(step=step, **row)
        console.step(step, run.loss, speed, (now - start) / (step - began) * (config.steps - step))
        if step % config.save_every == 0 or step == config.steps or asked:
            save(run, out)
            saved = step


def save(run: Run, out: Path) -> None:
    content = {
        "loss": run.loss,
        "tokens": run.tokens,
        "config": json.dumps(dataclasses.asdict(run.config)),
        "optimizer": run.optimizer.state_dict(),
    }
    save_checkpoint(out / "checkpoints", run.step, content, run.config.keep)


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """A list that the first SIGINT or SIGTERM is put into; a second one acts as it always does."""
    asked: list[int] = []
    old = {}

    def note(number: int, _frame: Any) -> None:
        asked.append(number)
        signal.signal(number, old[number])

    for number in (signal.SIGINT, signal.SIGTERM):
        try:
            old[number] = signal.signal(number, note)
        except ValueError:  # only the main thread may; elsewhere the caller handles signals
            break
    try:
        yield asked
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
