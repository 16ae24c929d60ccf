"""Trains a forecaster on the windows of a series: passes over the data, and the weights of the best one are kept."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from rookery.data.series import SeriesWindows
from rookery.models.forecast import Forecaster
from rookery.train.tasks.forecast import Loss, forecast_loss, held_out_loss


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """AdamW under one cycle of learning rates."""

    epochs: int = 6
    """Passes over the windows."""
    batch_size: int = 64
    """Windows a step; every channel of them is a series."""
    lr: float = 1e-3
    """Peak learning rate."""
    weight_decay: float = 0.01
    clip: float = 1.0
    """Largest global gradient norm."""
    warmup_share: float = 0.1
    """First part of the steps, in which the rate rises."""
    loss: Loss | None = None
    """"pinball" for models with levels and "mse" for others, unless given."""
    seed: int = 0
    """Of the order of the windows and of dropout."""


@dataclass(frozen=True)
class Fitted:
    """How training went."""

    epoch: int
    """The pass, from 1, whose weights were kept."""
    validation: tuple[float, ...]
    """Loss on the validation windows after every pass."""


def fit(
    model: Forecaster,
    train: SeriesWindows,
    validation: SeriesWindows,
    config: FitConfig,
    report: Callable[[str], None] = lambda line: None,
) -> Fitted:
    """Trains `model` in place and leaves it with the weights that predicted the validation windows best.

    `report` gets a line after every pass. Raises ArithmeticError where a loss is not finite.
    """
    kind = config.loss or ("pinball" if model.config.levels else "mse")
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True)
    steps = config.epochs * -(-len(train) // config.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: one_cycle(step, steps, config.warmup_share))
    order = np.random.Generator(np.random.Philox(key=config.seed))
    losses: list[float] = []
    best = None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        for epoch in range(1, config.epochs + 1):
            model.train()
            numbers = order.permutation(len(train))
            for start in range(0, len(train), config.batch_size):
                windows = torch.from_numpy(train.take(numbers[start : start + config.batch_size])).to(model.like)
                if not len(windows):  # nothing observed in any of them
                    continue
                loss = forecast_loss(model, windows, train.context, kind)
                if not math.isfinite(loss.item()):
                    raise ArithmeticError(f"the loss of pass {epoch} is {loss.item()}; lower lr or look at the data")
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
                optimizer.step()
                schedule.step()
            losses.append(held_out_loss(model, validation, config.batch_size, kind))
            report(f"epoch {epoch} of {config.epochs}: validation loss {losses[-1]:.4f}")
            if losses[-1] == min(losses):
                best = copy.deepcopy(model.state_dict())
    if best is not None:
        model.load_state_dict(best)
    model.eval()
    return Fitted(1 + losses.index(min(losses)), tuple(losses))


def one_cycle(step: int, steps: int, warmup_share: float) -> float:
    """Share of the peak rate before step `step` (from 0): up in a line, down in a half cosine."""
    warmup = max(1, round(warmup_share * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
