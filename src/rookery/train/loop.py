"""The training loop: batch, loss, step, log, save. The same call continues what it finds in the run's folder."""

import dataclasses
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

from rookery.data.text import Corpus, Windows, read_documents, split, tokenize, validation_rows
from rookery.errors import RookeryError
from rookery.models import create_model, load, save_model
from rookery.nn.language_model import LanguageModel
from rookery.tokenizers import Tokenizer, load_tokenizer
from rookery.tokenizers.pairing import NAMES as SHIPPED_TOKENIZERS
from rookery.tokenizers.trie import TrieTokenizer
from rookery.train.checkpoint import load_checkpoint, save_checkpoint
from rookery.train.config import DataConfig, TrainConfig
from rookery.train.optim import Optimizer, learning_rate
from rookery.train.tasks.language import language_loss
from rookery.train.track import Console, Metrics

MAY_CHANGE = {"out", "steps", "save_every", "keep", "validate_every", "threads"}
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
    model: LanguageModel
    optimizer: Optimizer
    windows: Windows
    held_out: Corpus
    step: int = 0
    loss: float = math.nan


def train(config: TrainConfig) -> Result:
    """Trains as `config` says, or continues the run in `config.out`.

    Writes metrics.jsonl, checkpoints/ and, at the end, model.safetensors. Ctrl-C and SIGTERM save a checkpoint after
    the current step and return. Raises TrainingFailed if the loss is not finite or the folder holds another run.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    run, tokenizer = prepare(config)
    resume(run, out)
    metrics = Metrics(out / "metrics.jsonl", run.step)
    with stop_requests() as asked, Console(config.steps, run.step) as console:
        try:
            loop(run, metrics, console, asked, out)
        finally:
            metrics.close()
    if run.step == config.steps:
        export(run, tokenizer, out)
    return Result(run.step, run.loss, asked[0] if asked else None)


def prepare(config: TrainConfig) -> tuple[Run, Tokenizer]:
    """Model, optimiser and data of a run that has not begun, and the tokenizer."""
    tokenizer = load_tokenizer(config.data.tokenizer)
    if not config.data.path:
        raise ValueError("no text to train on: give data.path, for example --set data.path=book.txt")
    learned, held_out = texts(config.data)
    model = starting_model(config, tokenizer.vocab_size)
    optimizer = Optimizer(model, config.optim, getattr(torch, config.dtype))
    windows = Windows(tokenize(learned, tokenizer), config.data.sequence_length, config.seed)
    return Run(config, model, optimizer, windows, tokenize(held_out, tokenizer)), tokenizer


def starting_model(config: TrainConfig, vocab_size: int) -> LanguageModel:
    """The model before the first step, in float32."""
    if not config.initial:
        return create_model(config.model, seed=config.seed, **{"vocab_size": vocab_size, **config.overrides})
    model = load(config.initial, dtype=torch.float32)
    if model.config.vocab_size < vocab_size:
        raise ValueError(
            f"{config.initial!r} knows {model.config.vocab_size} tokens, the tokenizer {config.data.tokenizer!r} has "
            f"{vocab_size}; give the tokenizer that the model was trained with"
        )
    return model


def texts(data: DataConfig) -> tuple[list[str], list[str]]:
    """Documents to learn from and held-out ones."""
    files = [list(read_documents(Path(part))) for part in data.path.split(",") if part]
    if data.validation:
        held_out = [text for part in data.validation.split(",") for text in read_documents(Path(part))]
        return [text for file in files for text in file], held_out
    parts = [split(file, data.validation_share) for file in files]
    return [t for learned, _ in parts for t in learned], [t for _, held_out in parts for t in held_out]


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
    run.step, run.loss = found["step"], found["loss"]


def _comparable(config: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps({key: value for key, value in config.items() if key not in MAY_CHANGE}))


def loop(run: Run, metrics: Metrics, console: Console, asked: list[int], out: Path) -> None:
    """Steps until the run ends or a stop is asked for; saves on the way and at the end."""
    config = run.config
    tokens_a_step = config.batch_size * config.data.sequence_length
    saved, began = run.step, run.step
    start = time.perf_counter()
    while run.step < config.steps and not asked:
        before = time.perf_counter()
        step = run.step + 1
        inputs, targets = run.windows.batch(step, config.batch_size)
        loss = language_loss(run.model, inputs, targets, config.l2wrap)
        loss.backward()
        if not math.isfinite(loss.item()):
            raise TrainingFailed(
                f"the loss of step {step} is {loss.item()}; the last checkpoint is of step {saved}. Lower optim.lr"
            )
        rate = learning_rate(config.optim, step, config.steps)
        norm = run.optimizer.step(rate)
        run.step, run.loss = step, loss.item()
        now = time.perf_counter()
        speed = tokens_a_step / (now - before)
        row = {
            "loss": run.loss,
            "lr": rate,
            "tokens": step * tokens_a_step,
            "tokens_per_second": speed,
            "grad_norm": norm,
        }
        if config.validate_every and (step % config.validate_every == 0 or step == config.steps):
            row |= validate(run)
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
        "config": json.dumps(dataclasses.asdict(run.config)),
        "optimizer": run.optimizer.state_dict(),
    }
    save_checkpoint(out / "checkpoints", run.step, content, run.config.keep)


@torch.no_grad()
def validate(run: Run) -> dict[str, float]:
    """Loss on the held-out text: nats a token and nats a character; empty if too little is held out."""
    corpus, length = run.held_out, run.config.data.sequence_length
    if len(corpus.tokens) <= length:
        return {}
    inputs, targets = validation_rows(corpus, length)
    rows = zip(inputs.split(run.config.batch_size), targets.split(run.config.batch_size))
    total = sum(float(language_loss(run.model, *pair)) * pair[0].shape[0] for pair in rows)
    loss = total / inputs.shape[0]
    # the corpus has an end-of-text token more than it has characters for, which the model must predict as well
    return {"validation_loss": loss, "validation_nats_per_character": loss * len(corpus.tokens) / corpus.characters}


def export(run: Run, tokenizer: Tokenizer, out: Path) -> None:
    """Writes the finished model in the run's dtype, and its tokenizer beside it unless that ships with the package."""
    name = run.config.data.tokenizer
    if name not in SHIPPED_TOKENIZERS:
        name = "vocab.txt" if isinstance(tokenizer, TrieTokenizer) else "tokenizer.json"
        tokenizer.save(out / name)
    save_model(run.model, out / "model.safetensors", metadata={"tokenizer": name})


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
