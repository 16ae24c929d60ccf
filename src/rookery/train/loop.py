"""The training loop: batch, loss, step, log, save. The same call continues what it finds in the run's folder."""

import dataclasses
import importlib
import json
import math
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rookery.errors import RookeryError
from rookery.nn.language_model import LanguageModel
from rookery.train.card import write_card
from rookery.train.checkpoint import newest_step, restore, save_by_first, save_checkpoint, save_sharded, sweep
from rookery.train.config import TrainConfig
from rookery.train.long_context import share_sequences
from rookery.train.optim import Optimizer, learning_rate, mixer_rate
from rookery.train.parallel import (
    Place,
    blocks_of,
    device_of,
    learns_in_full,
    let_go,
    moved,
    replicate,
    shard,
    units_of,
    whole,
)
from rookery.train.tasks.base import Task
from rookery.train.track import Console, Metrics, Silent

MAY_CHANGE = {
    *("out", "steps", "save_every", "keep", "validate_every", "threads", "merge"),
    *("accumulate", "recompute", "compile", "device", "bad_steps", "track", "context_parallel", "cache"),
}
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
    device: torch.device
    place: Place
    is_cut: bool = False
    """Whether each process holds a piece of the weights; else it holds all of them."""
    step: int = 0
    loss: float = math.nan
    tokens: int = 0
    bad: int = 0
    """Steps without a finite loss and gradient, in a row, up to now."""


def train(config: TrainConfig) -> Result:
    """Trains as `config` says, or continues the run in `config.out`.

    Writes metrics.jsonl, checkpoints/ and, at the end, the task's result. Ctrl-C and SIGTERM save a checkpoint after
    the current step and return. Raises TrainingFailed if the loss stays not finite or the folder holds another run,
    CannotSave if the disk is full. In a process group (torchrun) all processes call this.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    run = prepare(config)
    run.task.ready(out)
    let_go(run.task.model)
    if run.place.first:
        sweep(out / "checkpoints")
    resume(run, out)
    metrics = Metrics(out / "metrics.jsonl", run.step, config.track) if run.place.first else Silent()
    with stop_requests() as asked, Console(config.steps, run.step) if run.place.first else Silent() as console:
        try:
            number = loop(run, metrics, console, asked, out)
        finally:
            metrics.close()
    if run.step == config.steps:
        export(run, out)
    return Result(run.step, run.loss, number)


def prepare(config: TrainConfig) -> Run:
    """Model, optimiser and data of a run that has not begun."""
    place, device = Place.here(config.context_parallel), device_of(config.device)
    module, _, name = config.task.partition(":")
    task = getattr(importlib.import_module(module), name)(config)
    task.model.to(device)
    task.trained.to(device)
    if config.recompute:
        for unit in units_of(task.model):
            unit.forward = partial(checkpoint, unit.forward, use_reentrant=False)
    if config.compile:
        for block in blocks_of(task.model):
            block.compile(backend=config.compile)
    dtype = task.dtype
    is_cut = place.world > 1 and learns_in_full(task.model, task.trained)
    if place.world > 1:
        for part, _ in task.split(task.batch(1), place.groups * config.accumulate):  # refuses before weights are cut
            if place.context > 1:
                task.segment(part, place.part, place.context)
        if place.context > 1:
            share_sequences(task.model, place.context_group(device))
        if is_cut:
            shard(task.model, dtype, device)
            dtype = torch.float32  # FSDP gathers in the run's dtype; what is kept is float32
        else:
            replicate(task.model, task.trained)
    optimizer = Optimizer(task.trained, config.optim, dtype, None if is_cut else place.add_up)
    return Run(config, task, optimizer, device, place, is_cut)


def resume(run: Run, out: Path) -> None:
    """Takes over the newest checkpoint in the run's folder, if there is one."""

    def check(facts: dict[str, Any]) -> None:
        here, there = (_comparable(c) for c in (dataclasses.asdict(run.config), json.loads(facts["config"])))
        differing = [key for key in here if here[key] != there.get(key)]
        if differing:
            raise TrainingFailed(
                f"{str(out)!r} holds a run with other settings ({', '.join(differing)}); "
                "choose another out folder or restore them"
            )

    def structure() -> dict[str, Any]:
        run.optimizer.fill()
        return {"optimizer": run.optimizer.state_dict()}

    found = restore(out / "checkpoints", check, structure)
    if found is None:
        return
    facts, tensors = found
    run.optimizer.load_state_dict(tensors["optimizer"])
    run.step, run.loss, run.tokens, run.bad = (facts[name] for name in ("step", "loss", "tokens", "bad"))


def _comparable(config: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps({key: value for key, value in config.items() if key not in MAY_CHANGE}))


def loop(run: Run, metrics: Metrics, console: Console, asked: list[int], out: Path) -> int | None:
    """Steps until the run ends or a stop is asked for; saves on the way and at the end. Gives the signal, if any."""
    config = run.config
    began, start, number = run.step, time.perf_counter(), None
    while run.step < config.steps and number is None:
        before = time.perf_counter()
        row, number = one_step(run, out, asked)
        speed = row.pop("read") / (time.perf_counter() - before)
        row |= {"tokens_per_second": speed}
        step = run.step
        if "skipped" in row:
            console.say(f"step {step}: the loss or the gradient is not finite; skipped")
        if config.validate_every and (step % config.validate_every == 0 or step == config.steps):
            with run.optimizer.averaged():
                row |= run.task.validate()
                let_go(run.task.model)
            if "validation_loss" in row:
                console.say(f"step {step}: held-out loss {row['validation_loss']:.4f}")
        metrics.write(step=step, **row)
        console.step(step, run.loss, speed, (time.perf_counter() - start) / (step - began) * (config.steps - step))
        if step % config.save_every == 0 or step == config.steps or number is not None:
            save(run, out)
    return number


def gradients(run: Run, batch: Any) -> dict[str, Tensor]:
    """Goes through this process's part of the batch, forward and backward; its part of what is logged, in float64."""
    config, task, place = run.config, run.task, run.place
    parts = task.split(batch, place.groups * config.accumulate)
    totals: dict[str, Tensor] = {}
    for piece, weight in parts[place.group * config.accumulate :][: config.accumulate]:
        if place.context > 1:
            piece, weight = task.segment(piece, place.part, place.context), weight / place.context
        # what FSDP averages over processes must have been multiplied by their number to be the sum
        share = weight * (place.world if run.is_cut else 1)
        for name, value in task.backward(moved(piece, run.device), share).items():
            totals[name] = totals.get(name, 0.0) + weight * value.detach().double()
    return totals


def one_step(run: Run, out: Path, asked: Sequence[int] = ()) -> tuple[dict[str, Any], int | None]:
    """The next step of the optimiser; what is logged of it, and the signal that any process was sent, if any.

    A GPU is waited for once: its losses and gradients are looked at together, after all of the work was given to it.
    """
    config, task = run.config, run.task
    step = run.step + 1
    batch = task.batch(step)
    totals = gradients(run, batch)
    norm, rate, read = run.optimizer.clip(), learning_rate(config.optim, step, config.steps), task.tokens(batch)
    signals = totals["loss"].new_tensor([bool(asked), signal.SIGINT in asked])
    sums = torch.cat([torch.stack(list(totals.values())), signals])
    run.place.add_up([sums])
    *told, stop, by_hand, norm = torch.cat([sums, norm.double()[None]]).tolist()
    logged = dict(zip(totals, told))
    run.step, run.loss, run.tokens = step, logged["loss"], run.tokens + read
    skipped = not (math.isfinite(run.loss) and math.isfinite(norm))
    run.bad = run.bad + 1 if skipped else 0
    if skipped:
        run.optimizer.clear()
        if run.bad >= config.bad_steps:
            last = newest_step(out / "checkpoints")
            raise TrainingFailed(
                f"the loss of step {step} is {logged['loss']}, its gradient's norm {norm}: none of the last "
                f"{run.bad} steps could be taken; the last checkpoint is of step {last}. Lower optim.lr"
            )
    else:
        run.optimizer.take(rate, mixer_rate(config.optim, step, config.steps))
        task.after_step()
    row = {**logged, "lr": rate, "tokens": run.tokens, "grad_norm": norm, "read": read}
    number = (signal.SIGINT if by_hand else signal.SIGTERM) if stop else None
    return row | {"skipped": True} if skipped else row, number


def save(run: Run, out: Path) -> None:
    facts = {
        "loss": run.loss,
        "tokens": run.tokens,
        "bad": run.bad,
        "config": json.dumps(dataclasses.asdict(run.config)),
    }
    tensors = {"optimizer": run.optimizer.state_dict()}
    if run.is_cut:
        save_sharded(out / "checkpoints", run.step, tensors, facts, run.config.keep)
    elif run.place.world > 1:
        save_by_first(out / "checkpoints", run.step, facts | tensors, run.config.keep)
    else:
        save_checkpoint(out / "checkpoints", run.step, facts | tensors, run.config.keep)


def export(run: Run, out: Path) -> None:
    """Writes the finished result, by one process."""
    with run.optimizer.averaged():
        if run.is_cut:
            full = whole(run.task.model, run.task.dtype)
            if full is None:
                return
            run.task.model = full
        elif not run.place.first:
            return
        elif run.device.type != "cpu":  # files are written from memory, and what a task kept from before is there
            run.task.model.to("cpu")
            run.task.trained.to("cpu")
        run.task.export(out)
    last = json.loads((out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    facts = {name: value for name, value in last.items() if "loss" in name or name in ("step", "tokens")}
    parameters = sum(p.numel() for p in run.task.model.parameters())
    known = {name: value for name, value in facts.items() if value is not None}
    writes = isinstance(run.task.model, LanguageModel)
    write_card(out / "README.md", run.config, parameters, known, writes=writes)


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
