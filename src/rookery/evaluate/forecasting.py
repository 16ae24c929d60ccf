"""The standard protocol of long-term forecasting: published borders, scaling on training rows, every window counted.

MSE and MAE are of scaled values, averaged over all windows, points and channels (timeseries.md 5). They depend on the
lookback: compare figures of one lookback only.
"""

import os
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch

from rookery.data.series import SeriesWindows, period_of, read_table, scaled, standard_splits
from rookery.errors import unknown
from rookery.families.forecast import median_of
from rookery.models import load

Baseline = Callable[[np.ndarray, int, int], np.ndarray]
"""Histories [b, l], horizon and period of the season -> forecasts [b, horizon]."""


AT_ONCE = 4096
"""Series that a model reads in one call: sets of many channels would fill the memory otherwise (Traffic has 862)."""


class CanForecast(Protocol):
    """What `evaluate` asks of a model."""

    config: Any

    def forecast(self, series: torch.Tensor, horizon: int) -> torch.Tensor:
        """[b, horizon, q] after [b, l]."""


def persistence(history: np.ndarray, horizon: int, period: int) -> np.ndarray:
    """The last observed value, for ever."""
    return np.repeat(filled(history)[:, -1:], horizon, axis=1)


def seasonal_naive(history: np.ndarray, horizon: int, period: int) -> np.ndarray:
    """The last season over and over."""
    return _repeated(filled(history)[:, -period:], horizon)


def profile(history: np.ndarray, horizon: int, period: int) -> np.ndarray:
    """The mean of the last seven seasons (or of as many as there are), over and over."""
    cycles = max(1, min(7, history.shape[1] // period))
    seasons = filled(history)[:, -cycles * period :].reshape(len(history), cycles, -1)
    return _repeated(seasons.mean(axis=1), horizon)


def filled(history: np.ndarray) -> np.ndarray:
    """Missing points replaced by the last observed one before them, or by the first one after them."""
    seen = ~np.isnan(history)
    if seen.all():
        return history
    last = np.maximum.accumulate(np.where(seen, np.arange(history.shape[1]), -1), axis=1)
    last = np.where(last < 0, seen.argmax(axis=1)[:, None], last)
    return np.take_along_axis(history, last, axis=1)


def _repeated(season: np.ndarray, horizon: int) -> np.ndarray:
    return np.tile(season, -(-horizon // season.shape[1]))[:, :horizon]


BASELINES: dict[str, Baseline] = {
    "persistence": persistence,
    "seasonal-naive": seasonal_naive,
    "profile": profile,
}
"""Forecasts without learning, by the names that `evaluate` takes."""


def evaluate(
    model: CanForecast | str,
    csv_path: str | os.PathLike[str],
    lookback: int = 336,
    horizon: int = 96,
    *,
    period: int | None = None,
    batch_size: int = 64,
) -> dict[str, Any]:
    """Test metrics of a forecaster on a CSV file under the standard protocol.

    `model` is a trained forecaster, the path of one, or "persistence", "seasonal-naive" or "profile"; `period` is the
    season in rows (from the dates of the file by default); `batch_size` windows are forecast at once. Gives "mse",
    "mae", "mase" (of scaled values), "windows", "lookback", "horizon", "period", and for models with quantiles "wql"
    (mean weighted quantile loss) and "coverage" (share of points between the lowest and the highest level).
    """
    if lookback < 1 or horizon < 1:
        raise ValueError(f"lookback and horizon must be at least 1 row, got {lookback} and {horizon}")
    model = resolved(model)
    table = read_table(csv_path)
    splits = standard_splits(table)
    table = scaled(table, splits)
    period = period_of(table.step) if period is None else period
    windows = SeriesWindows(table.values, splits.test, lookback, horizon)
    sums = Sums(levels_of(model))
    predict = predictor(model, horizon, period)
    for batch in windows.batches(batch_size):
        sums.add(predict(batch[:, :lookback]), batch[:, lookback:])
    naive = naive_error(table.values[splits.train.start : splits.train.stop], period)
    return {
        **sums.means(),
        "mase": sums.means()["mae"] / naive if naive else float("nan"),
        "windows": len(windows),
        "lookback": lookback,
        "horizon": horizon,
        "period": period,
    }


def resolved(model: CanForecast | str) -> CanForecast | str:
    """The model itself, loaded where its path is given; the name of a baseline stays one."""
    if not isinstance(model, str) or model in BASELINES:
        return model
    if not os.path.exists(model):
        raise unknown(
            "forecaster", model, BASELINES, "a path of a trained one, or `rookery.evaluate.forecasting.BASELINES`"
        )
    return load(model, dtype=torch.float32).eval()  # values have more digits than bfloat16


def levels_of(model: CanForecast | str) -> tuple[float, ...]:
    """Quantile levels that the model predicts."""
    return () if isinstance(model, str) else tuple(model.config.levels)


def predictor(model: CanForecast | str, horizon: int, period: int) -> Callable[[np.ndarray], np.ndarray]:
    """Histories float32 [b, l] -> forecasts [b, horizon, q]; models read `AT_ONCE` of them at a time."""
    if isinstance(model, str):
        return lambda history: BASELINES[model](history, horizon, period)[..., None]

    def ahead(history: np.ndarray) -> np.ndarray:
        parts = [model.forecast(part, horizon) for part in torch.from_numpy(history).split(AT_ONCE) if len(part)]
        if not parts:
            return np.empty((0, horizon, model.config.outputs), np.float32)
        return torch.cat(parts).float().cpu().numpy()

    return ahead


def naive_error(train: np.ndarray, period: int) -> float:
    """Mean absolute error of the seasonal naive forecast inside the training rows [rows, channels]; MASE's unit."""
    return float(np.nanmean(np.abs(train[period:] - train[:-period])))


class Sums:
    """Errors added up over batches, so that the mean does not depend on their size; missing targets do not count."""

    def __init__(self, levels: tuple[float, ...] = ()) -> None:
        self.levels = levels
        self.count = 0
        self.squared = self.absolute = self.pinball = self.size = self.covered = 0.0

    def add(self, predicted: np.ndarray, actual: np.ndarray) -> None:
        """`predicted` [b, k, q] against `actual` [b, k]."""
        seen = ~np.isnan(actual)
        predicted, actual = predicted[seen].astype(np.float64), actual[seen].astype(np.float64)
        centre = predicted[:, median_of(self.levels)]
        self.count += len(actual)
        self.squared += float(np.square(centre - actual).sum())
        self.absolute += float(np.abs(centre - actual).sum())
        self.size += float(np.abs(actual).sum())
        if self.levels:
            error = actual[:, None] - predicted
            level = np.asarray(self.levels)
            self.pinball += float(np.maximum(level * error, (level - 1) * error).sum())
            self.covered += float(((predicted[:, 0] <= actual) & (actual <= predicted[:, -1])).sum())

    def means(self) -> dict[str, float]:
        """The metrics; NaN where no target was observed."""
        count = self.count or float("nan")
        means = {"mse": self.squared / count, "mae": self.absolute / count}
        if self.levels:
            means["wql"] = 2 * self.pinball / (len(self.levels) * (self.size or float("nan")))
            means["coverage"] = self.covered / count
        return means
