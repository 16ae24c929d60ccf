"""Contenders of equal size, trained on equal data: on text with the library's trainer, on generated rows with `fit`."""

import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from math import prod
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from rookery.data.generated import UNLABELLED, Task, rows
from rookery.models import create_model
from rookery.registry import configure
from rookery.reproduce.base import Work
from rookery.train.config import OptimConfig, TrainConfig
from rookery.train.loop import train
from rookery.train.optim import Optimizer, learning_rate


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One contender."""

    name: str
    """As the table shows it; part of file names."""
    model: str = ""
    """Registered name; the same as `name` where empty."""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """Fields of its config."""
    baseline: bool = False
    build: Callable[[int], nn.Module] | None = None
    """seed -> model, for contenders that are not registered; in place of `model` and `overrides`."""

    def create(self, seed: int) -> nn.Module:
        """The untrained model."""
        return self.build(seed) if self.build else create_model(self.model or self.name, seed=seed, **self.overrides)


def parameters(model: str, overrides: Mapping[str, Any]) -> int:
    """Number of parameters, from the config alone."""
    family, config = configure(model, **overrides)
    return sum(prod(shape) for shape in family.tensor_shapes(config).values())


def matched(
    model: str, overrides: Mapping[str, Any], *, budget: int, by: str = "intermediate_size", step: int = 8
) -> dict[str, Any]:
    """`overrides` with the field `by` chosen, in multiples of `step`, so that the model has about `budget` parameters.

    The number of parameters must grow linearly with the field. Raises ValueError where no value comes within 2%.
    """
    one, two = (parameters(model, {**overrides, by: value}) for value in (step, 2 * step))
    steps = max(1, 1 + round((budget - one) / (two - one)))
    chosen = {**overrides, by: steps * step}
    count = parameters(model, chosen)
    if abs(count - budget) > 0.02 * budget:
        raise ValueError(
            f"{model} cannot have {budget} parameters by its {by}: {chosen[by]} makes {count}; change others"
        )
    return chosen


@dataclass(frozen=True)
class Trained:
    """What training on text left behind."""

    model: Path
    """model.safetensors"""
    losses: list[float]
    """Nats per token, one a step."""
    tokens_per_second: float
    """Median over the steps."""


def train_on_text(work: Work, arm: Arm, seed: int, config: TrainConfig) -> Trained:
    """Trains `arm` as `config` says, in a folder of its own below `work.folder`; goes on where it was interrupted."""
    out = work.folder / "runs" / f"{arm.name}-{seed}-{config.optim.lr:g}"
    chosen = {"model": arm.model or arm.name, "overrides": dict(arm.overrides), "seed": seed, "out": str(out)}
    config = TrainConfig(**{f.name: getattr(config, f.name) for f in fields(config)} | chosen)
    work.say(f"{arm.name}, seed {seed}")
    result = train(config)
    if result.signal is not None:  # the trainer has saved; the parts that are finished are kept
        raise KeyboardInterrupt
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    speed = statistics.median(row["tokens_per_second"] for row in metrics)
    return Trained(out / "model.safetensors", [row["loss"] for row in metrics], speed)


def labelled_loss(model: nn.Module, tokens: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy in nats at the labelled positions; logits are computed for these only."""
    features, _ = model.features(tokens, None, None)
    asked = labels != UNLABELLED
    return nn.functional.cross_entropy(model.head(features[asked]).float(), labels[asked])


@torch.no_grad()
def accuracy(model: nn.Module, tokens: Tensor, labels: Tensor, batch: int = 64) -> float:
    """Share of the labelled positions whose likeliest token is the label."""
    right = asked = 0
    for some, wanted in zip(tokens.split(batch), labels.split(batch)):
        features, _ = model.features(some, None, None)
        places = wanted != UNLABELLED
        right += int((model.head(features[places]).argmax(-1) == wanted[places]).sum())
        asked += int(places.sum())
    return right / asked


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How `fit` trains: AdamW with warm-up and cosine, fresh rows every step."""

    steps: int
    batch_size: int
    lr: float
    weight_decay: float = 0.1
    beta2: float = 0.98
    stop_at: float = 2.0
    """Accuracy on the test rows at which training ends early; above 1 never."""
    test_every: int = 250
    test_rows: int = 256
    say_every: float = 10.0
    """Seconds between lines."""

    def optim(self) -> OptimConfig:
        return OptimConfig(
            lr=self.lr,
            final_lr=self.lr / 10,
            warmup_steps=min(50, self.steps // 4),
            weight_decay=self.weight_decay,
            beta2=self.beta2,
            eps=1e-8,
        )


def fit(
    model: nn.Module, task: Callable[[int], Task], seed: int, how: Fit, say: Callable[[str], None]
) -> list[tuple[int, float]]:
    """Trains a language model on rows of `task(step)` and gives (steps, accuracy on the test rows of the last task).

    Rows depend on the seed and the step alone, so every arm sees the same ones.
    """
    settings = how.optim()
    optimizer = Optimizer(model, settings, torch.float32)
    test = rows(task(how.steps), seed=seed, first=0, count=how.test_rows, split="test")
    curve, said = [], time.perf_counter()
    for step in range(1, how.steps + 1):
        tokens, labels = rows(task(step), seed=seed, first=(step - 1) * how.batch_size, count=how.batch_size)
        loss = labelled_loss(model, tokens, labels)
        if not math.isfinite(loss.item()):
            raise ValueError(f"the loss of step {step} is {loss.item()}; lower the learning rate ({how.lr})")
        loss.backward()
        optimizer.step(learning_rate(settings, step, how.steps))
        if step % how.test_every == 0 or step == how.steps:
            curve.append((step, accuracy(model, *test)))
            if curve[-1][1] >= how.stop_at:
                break
        if time.perf_counter() - said > how.say_every:
            said = time.perf_counter()
            say(f"  step {step}/{how.steps}  loss {loss.item():.3f}  accuracy {curve[-1][1] if curve else 0:.3f}")
    return curve


class Named(Protocol):
    """What `searched` asks of a contender."""

    @property
    def name(self) -> str: ...


Contender = TypeVar("Contender", bound=Named)


def searched(
    work: Work,
    arm: Contender,
    *,
    rates: Sequence[float],
    seeds: Sequence[int],
    train: Callable[[Contender, int, float], dict[str, Any]],
    score: Callable[[dict[str, Any]], float],
) -> tuple[float, list[dict[str, Any]]]:
    """The learning rate with the highest score on the first seed, and what `train(arm, seed, rate)` gives with it.

    Every arm gets the same rates; without a search (one rate) or with it, a table says which. The results are parts.
    """

    def found(seed: int, rate: float) -> dict[str, Any]:
        return work.part(f"{arm.name}-{seed}-{rate:g}", lambda: train(arm, seed, rate))

    tried = {rate: score(found(seeds[0], rate)) for rate in rates} if len(rates) > 1 else {rates[0]: 0.0}
    best = max(tried, key=tried.__getitem__)
    # the first seed's part is there already, and not counted twice
    return best, [found(seed, best) for seed in seeds]


def all_searched(
    work: Work,
    arms: Sequence[Arm],
    *,
    how: Fit,
    rates: Sequence[float],
    seeds: Sequence[int],
    measure: Callable[[Arm, int, Fit, Work], dict[str, Any]],
) -> dict[str, tuple[float, list[dict[str, Any]]]]:
    """`searched` for every arm, by name: trained as `how` says but for the rate, `measure` giving the "curve" of `fit`.

    The best rate is the one of the highest accuracy at the end, among equals the one that was there first.
    """
    work.planned = len(arms) * (len(seeds) + len(rates) - 1)
    return {
        arm.name: searched(
            work,
            arm,
            rates=rates,
            seeds=seeds,
            train=lambda arm, seed, rate: measure(arm, seed, replace(how, lr=rate), work),
            score=lambda part: part["curve"][-1][1] - part["curve"][-1][0] * 1e-9,
        )
        for arm in arms
    }


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Running mean over the last `window` values, for curves."""
    return [statistics.fmean(values[max(0, i + 1 - window) : i + 1]) for i in range(len(values))]
