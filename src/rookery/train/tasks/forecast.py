"""Predict the points that follow each patch of a series."""

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import huber_loss

from rookery.data.order import Permuted
from rookery.data.series import SeriesWindows, read_table, scaled, standard_splits
from rookery.models import create_model, load, save_model
from rookery.models.forecast import Forecaster, middle
from rookery.train.config import TrainConfig
from rookery.train.tasks.base import Task

Loss = Literal["mse", "mae", "huber", "pinball"]


def forecast_loss(model: Forecaster, windows: Tensor, context: int, kind: Loss = "mse") -> Tensor:
    """Mean loss over what every token of `windows` [b, l] predicts; their first `context` points are history.

    Values are scaled by the statistics of the history.
    """
    return score(*model.pairs(windows, context), model.config.levels, kind)


def score(predicted: Tensor, actual: Tensor, levels: tuple[float, ...], kind: Loss) -> Tensor:
    """Mean loss of `predicted` [..., q] against `actual` [...], 0 where every target is missing (NaN).

    "pinball" is the mean over the levels (at 0.5 half the absolute error); the others score the median or the one value
    that is predicted.
    """
    seen = ~actual.isnan()
    predicted, actual = predicted[seen], actual[seen]
    if kind == "pinball":
        if not levels:
            raise ValueError("the pinball loss needs a model with quantile levels, for example levels=(0.1, 0.5, 0.9)")
        error = actual[:, None] - predicted
        level = torch.tensor(levels).to(error)
        losses = torch.maximum(level * error, (level - 1) * error)
    else:
        error = middle(predicted, levels) - actual
        losses = {"mse": error.square(), "mae": error.abs(), "huber": huber_loss(error, 0 * error, reduction="none")}[
            kind
        ]
    return losses.sum() / max(1, losses.numel())


class ForecastTask(Task):
    """Windows of the channels of a CSV file under the standard splits; the config's model is a forecaster.

    A window is `context_length` points of the model's config and as many as it predicts at once. Every pass over the
    windows has an order of its own, a function of the seed alone.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        if not config.data.path:
            raise ValueError("no series to train on: give data.path, for example --set data.path=ETTh1.csv")
        self.model = self.trained = starting_forecaster(config)
        self.dtype = getattr(torch, config.dtype)
        sizes = self.model.config
        table = read_table(config.data.path)
        splits = standard_splits(table)
        values = scaled(table, splits).values
        self.windows = SeriesWindows(values, splits.train, sizes.context_length, sizes.reach)
        self.held_out = SeriesWindows(values, splits.validation, sizes.context_length, sizes.reach)
        self.kind: Loss = "pinball" if sizes.levels else "mse"
        self.order = Permuted(len(self.windows), config.seed)

    def batch(self, step: int) -> Tensor:
        """Windows [batch_size · channels, points] of `step`."""
        self.step = step
        places = (step - 1) * self.config.batch_size + np.arange(self.config.batch_size)
        return torch.from_numpy(self.windows.take(np.array([self.order.item(int(place)) for place in places])))

    def tokens(self, batch: Tensor) -> int:
        return batch.shape[0] * (self.windows.context // self.model.config.patch_length)

    def loss(self, batch: Tensor) -> dict[str, Tensor]:
        self.model.train()
        with torch.random.fork_rng():  # dropout is a function of the step, so that a resumed run is exact
            torch.manual_seed(self.config.seed * 1_000_003 + self.step)
            return {"loss": forecast_loss(self.model, batch.to(self.model.like), self.windows.context, self.kind)}

    def split(self, batch: Tensor, parts: int) -> list[tuple[Tensor, float]]:
        """Parts of equally many series. With missing targets the sum weighs series by parts, not by targets."""
        if len(batch) % parts:
            raise ValueError(f"{len(batch)} series (batch_size × channels) cannot be divided among {parts} parts")
        return [(piece, 1 / parts) for piece in batch.chunk(parts)]

    def validate(self) -> dict[str, float]:
        """Loss of what follows the last token of each held-out window."""
        return {"validation_loss": held_out_loss(self.model, self.held_out, self.config.batch_size, self.kind)}

    def export(self, out: Path) -> None:
        save_model(self.model, out / "model.safetensors")


def starting_forecaster(config: TrainConfig) -> Forecaster:
    """The model before the first step, in float32; ValueError where the config names another kind of model."""
    if config.initial:
        model = load(config.initial, dtype=torch.float32)
    else:
        model = create_model(config.model, seed=config.seed, **config.overrides)
    if not isinstance(model, Forecaster):
        raise ValueError(f"{config.initial or config.model!r} is no forecaster; rimer, timer, rwkv-ts and dlinear are")
    return model


@torch.no_grad()
def held_out_loss(model: Forecaster, windows: SeriesWindows, batch_size: int, kind: Loss) -> float:
    """Mean loss of the observed points that follow the last token of each window, 0 where there are none."""
    model.eval()
    total = count = 0
    for batch in filter(len, windows.batches(batch_size)):
        predicted, actual = model.pairs(torch.from_numpy(batch).to(model.like), windows.context)
        observed = int((~actual[:, -1].isnan()).sum())
        total += float(score(predicted[:, -1], actual[:, -1], model.config.levels, kind)) * observed
        count += observed
    return total / max(1, count)
