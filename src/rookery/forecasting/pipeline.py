"""The front door for series: from data frames, arrays or lists to quantiles, and back."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rookery.data.series import SeriesWindows
from rookery.errors import unknown
from rookery.evaluate.forecasting import Sums, naive_error
from rookery.families.rimer import LEVELS
from rookery.forecasting.fit import FitConfig, Fitted, fit
from rookery.forecasting.frames import items_of
from rookery.forecasting.inputs import check_observed, histories, history, whole
from rookery.forecasting.result import Forecast, pandas, quantiles
from rookery.forecasting.stream import ForecastStream
from rookery.models import create_model, load, save_model
from rookery.models.forecast import Forecaster, middle

SHIPPED = Path(__file__).parents[1] / "assets" / "forecaster" / "model.safetensors"
"""The forecaster that comes with the package."""

Metric = Callable[[np.ndarray, np.ndarray], float]
"""(predicted [k], actual [k]) -> a number."""


class ForecastPipeline:
    """A forecaster and what is needed to use it on tables."""

    def __init__(self, model: Forecaster) -> None:
        self.model = model.eval()

    @staticmethod
    def from_pretrained(path: str | os.PathLike[str] | None = None) -> ForecastPipeline:
        """The pipeline in a file, in a folder that `save` wrote, or (without a path) the one that is shipped."""
        path = Path(SHIPPED if path is None else path)
        model = load(path / "model.safetensors" if path.is_dir() else path, dtype=torch.float32)
        if not isinstance(model, Forecaster):
            raise ValueError(f"{str(path)!r} is a {model.family} model, not a forecaster")
        return ForecastPipeline(model)

    @staticmethod
    def fit(
        data: Any,
        model: str | Forecaster = "rimer-tiny",
        *,
        horizon: int | None = None,
        validation_share: float = 0.2,
        config: FitConfig | None = None,
        report: Callable[[str], None] = lambda line: None,
        target: str = "target",
        timestamp_column: str = "timestamp",
        id_column: str | None = None,
        **overrides: Any,
    ) -> tuple[ForecastPipeline, Fitted]:
        """Trains a forecaster on a series [points], channels [points, channels], or a long frame of one item or more.

        `model` is a registered name, with fields of its config as `overrides`, or a forecaster to train on. `horizon`
        is what training windows show after their context (by default what the model predicts at once). The last
        `validation_share` of the points chooses the best pass. Series of a frame must be equally long.
        """
        if hasattr(data, "columns"):
            items = items_of(data, id_column, timestamp_column, target)
            if len({len(item.values) for item in items}) > 1:
                raise ValueError("the items are of unequal length; fit on those of one length, or cut them to it")
            data = np.stack([item.values for item in items], axis=1)
        values = _columns(data)
        config = config or FitConfig()
        built = create_model(model, seed=config.seed, **overrides) if isinstance(model, str) else model
        if not isinstance(built, Forecaster):
            raise ValueError(f"{model!r} is no forecaster; rimer, timer, rwkv-ts and dlinear are")
        if not 0 < validation_share < 1:
            raise ValueError(f"validation_share must lie between 0 and 1, got {validation_share:g}")
        context = built.config.context_length
        horizon = built.config.reach if horizon is None else whole("horizon", horizon)
        cut = round(len(values) * (1 - validation_share))
        parts = [SeriesWindows(values, rows, context, horizon) for rows in (range(cut), range(cut, len(values)))]
        fitted = fit(built, *parts, config, report)
        return ForecastPipeline(built), fitted

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the model into `folder`."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_model(self.model, Path(folder) / "model.safetensors")

    def predict(self, history: Any, horizon: int, *, item_id: str = "", index: Any = None) -> Forecast:
        """The forecast of one series [points], NaN where missing; errors call it `item_id`."""
        ahead = self._ahead([history], horizon, [repr(item_id)] if item_id else None)
        return Forecast(*ahead[0], index, np.asarray(history, np.float32), item_id)

    def predict_quantiles(
        self, inputs: Any, prediction_length: int, quantile_levels: Sequence[float] = LEVELS
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Quantiles float32 [b, prediction_length, levels] and the mean [b, prediction_length], on the CPU.

        `inputs` is one series, a list of series of any length, or a matrix [b, points] with NaN on the left of shorter
        ones. ValueError names the series and the point that cannot be used.
        """
        return self._quantiles(inputs, prediction_length, quantile_levels)

    def _quantiles(
        self, inputs: Any, horizon: int, quantile_levels: Sequence[float], names: Sequence[str] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ahead = self._ahead(inputs, horizon, names)
        values = np.stack([quantiles(values, levels, quantile_levels) for levels, values in ahead])
        means = np.stack([Forecast(levels, values).mean for levels, values in ahead])
        return torch.from_numpy(values), torch.from_numpy(means)

    def predict_df(
        self,
        df: Any,
        *,
        prediction_length: int,
        id_column: str | None = "item_id",
        timestamp_column: str = "timestamp",
        target: str = "target",
        quantile_levels: Sequence[float] = LEVELS,
        freq: str | None = None,
        batch_size: int = 256,
        validate_inputs: bool = True,
    ) -> Any:
        """A long data frame: item, future times, "target_name", "predictions" (the mean), one column a level ("0.1").

        Items come in the order in which they first appear; a frame without the column "item_id" is one item. The
        frequency is inferred; gaps, times that repeat and unusable items are errors that name them (see `items_of`).
        """
        pd = pandas()
        if id_column == "item_id" and id_column not in getattr(df, "columns", [id_column]):
            id_column = None
        items = items_of(df, id_column, timestamp_column, target, freq, validate_inputs)
        parts = []
        for start in range(0, len(items), whole("batch_size", batch_size)):
            some = items[start : start + batch_size]
            values = [item.values for item in some]
            names = [f"item {item.name!r}" for item in some]
            found, means = self._quantiles(values, prediction_length, quantile_levels, names)
            for item, values, mean in zip(some, found.numpy(), means.numpy()):
                part = {id_column: item.name} if id_column else {}
                part |= {timestamp_column: item.future(prediction_length), "target_name": target, "predictions": mean}
                parts.append(pd.DataFrame(part | {str(q): values[:, i] for i, q in enumerate(quantile_levels)}))
        return pd.concat(parts, ignore_index=True)

    def historical_forecasts(
        self,
        series: Any,
        horizon: int,
        *,
        stride: int = 1,
        start: int | float = 0.5,
        retrain: bool | FitConfig = False,
        last_points_only: bool = True,
    ) -> np.ndarray | list[Forecast]:
        """What would have been forecast in the past, every `stride` points from `start` (a point, or a share) on.

        With `retrain` (as a FitConfig says, or by default) a copy of the model is trained on the points before each
        forecast, which takes as long as it sounds; without, the model is used as it is, whatever it was trained on.
        With `last_points_only` an array [forecasts, 2] of the place of each forecast's last point and its value,
        otherwise the forecasts, their `index` being places in the series.
        """
        values, horizon = history(series, "the series"), whole("horizon", horizon)
        first = round(start * len(values)) if isinstance(start, float) else start
        if not 0 < first <= len(values) - horizon:
            raise ValueError(f"start {first} leaves no room for {horizon} points in a series of {len(values)}")
        ends = range(first, len(values) - horizon + 1, whole("stride", stride))
        if retrain:
            config = retrain if isinstance(retrain, FitConfig) else None
            ahead = [self._trained_on(values[:end], config)._ahead([values[:end]], horizon)[0] for end in ends]
        else:
            ahead = self._ahead([values[:end] for end in ends], horizon)
        found = [Forecast(*a, np.arange(end, end + horizon), values[:end]) for a, end in zip(ahead, ends)]
        if not last_points_only:
            return found
        return np.array([[forecast.index[-1], forecast.median[-1]] for forecast in found])

    def _trained_on(self, values: np.ndarray, config: FitConfig | None) -> ForecastPipeline:
        return ForecastPipeline.fit(values, copy.deepcopy(self.model), config=config)[0]

    def backtest(
        self,
        series: Any,
        horizon: int,
        *,
        metrics: Iterable[str | Metric] = ("mse", "mae", "mase"),
        period: int = 1,
        **options: Any,
    ) -> dict[str, float]:
        """Means of metrics, by their names, over `historical_forecasts(series, horizon, **options)`.

        A metric is a function of (predicted median [k], actual [k]), or a name: "mse", "mae", "mase" (in units of the
        naive forecast that repeats what was `period` points ago), and for models with levels "wql" and "coverage" (see
        `rookery.evaluate.forecasting`). Missing points do not count in those that have names.
        """
        values = history(series, "the series")
        found = self.historical_forecasts(values, horizon, last_points_only=False, **options)
        sums = Sums(self.model.config.levels)
        for forecast in found:
            sums.add(forecast.values, values[forecast.index])
        known = sums.means()
        known["mase"] = known["mae"] / naive_error(values[:, None], whole("period", period))
        results = {}
        for metric in metrics:
            if not isinstance(metric, str):
                scores = [metric(forecast.median, values[forecast.index]) for forecast in found]
                results[metric.__name__] = float(np.mean(scores))
            elif metric in known:
                results[metric] = known[metric]
            else:
                raise unknown("metric", metric, known, "the documentation of backtest")
        return results

    def open_stream(self, context: Any) -> ForecastStream:
        """A stream that takes one value at a time; it starts after `context` [points]."""
        return ForecastStream(self.model, history(context, "the context"))

    def impute(self, series: Any) -> np.ndarray:
        """The series [points] with missing points replaced by forecasts, float32.

        A gap is forecast from both sides, the series being read backwards from its right; the two are blended in a line
        from one end of the gap to the other. ValueError where nothing was observed.
        """
        given = history(series, "the series")
        values = given.copy()
        missing = np.isnan(values)
        if missing.all():
            raise ValueError("there is no observed value to fill the others from")
        for start, end in _runs(missing):
            sides = {}
            if start:
                sides["left"] = self.predict(values[:start], end - start).median
            if end < len(values):
                sides["right"] = self.predict(given[end:][::-1], end - start).median[::-1]
            weight = np.linspace(1, 0, end - start + 2)[1:-1] if len(sides) == 2 else float("left" in sides)
            values[start:end] = weight * sides.get("left", 0) + (1 - np.asarray(weight)) * sides.get("right", 0)
        return values

    def detect_anomalies(self, series: Any, quantile: float = 0.99) -> tuple[np.ndarray, np.ndarray]:
        """Score float32 [points] and whether it is among the highest, bool [points].

        The score of a patch is the mean squared error of its prediction from all that came before, in units of the
        spread of the series; points of the first patch, which nothing predicts, score 0.
        """
        values = history(series, "the series")
        if not 0 <= quantile <= 1:
            raise ValueError(f"quantile must lie between 0 and 1, got {quantile:g}")
        length, levels = self.model.config.patch_length, self.model.config.levels
        if not self.model.streams:
            raise ValueError(f"{self.model.family} predicts nothing before the end of its context; use rimer or timer")
        if len(values) < 2 * length:
            raise ValueError(f"{len(values)} points are fewer than two patches of {length}")
        points = torch.from_numpy(values)[None].to(self.model.like)
        with torch.no_grad():
            predicted, actual = self.model.pairs(points, len(values))
        errors = (
            (middle(predicted[0, :-1, :length], levels) - actual[0, :-1, :length])
            .square()
            .nanmean(dim=1)
            .nan_to_num(nan=0.0)
        )
        score = np.repeat(errors.float().numpy(), length)
        score = np.concatenate([np.zeros(len(values) - len(score), np.float32), score])
        return score, score > np.quantile(score, quantile)

    def _ahead(
        self, inputs: Any, horizon: int, names: Sequence[str] | None = None
    ) -> list[tuple[tuple[float, ...], np.ndarray]]:
        """Levels and values [horizon, q] after each series; those of unequal length are padded on the left."""
        horizon, given = whole("horizon", horizon), histories(inputs, names)
        context = max(self.model.config.context_length, self.model.config.patch_length)
        longest = min(context, max(len(values) for values in given))
        rows = np.full((len(given), longest), np.nan, np.float32)
        for number, (row, values) in enumerate(zip(rows, given)):
            check_observed(values, context, names[number] if names else f"series {number}")
            row[longest - min(longest, len(values)) :] = values[-longest:]
        found = self.model.forecast(torch.from_numpy(rows).to(self.model.like.device), horizon).float().cpu().numpy()
        return [(self.model.config.levels, values) for values in found]


def _columns(data: Any) -> np.ndarray:
    """Channels float64 [points, channels] from one series [points], NaN where missing, or from such a matrix."""
    try:
        values = np.asarray(data, np.float64)
    except (TypeError, ValueError) as reason:
        raise ValueError(f"fit takes numbers [points] or [points, channels]: {reason}") from None
    values = values[:, None] if values.ndim == 1 else values
    if values.ndim != 2:
        raise ValueError(f"fit takes values [points] or [points, channels], got shape {list(values.shape)}")
    if np.isnan(values).all():
        raise ValueError("there is no observed value to learn from")
    if (bad := np.argwhere(np.isinf(values))).size:
        point, channel = bad[0]
        raise ValueError(f"point {point} of channel {channel} is infinite; fit takes finite values, NaN where missing")
    return values


def _runs(missing: np.ndarray) -> list[tuple[int, int]]:
    """Start and end of every run of true values."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], missing, [False]]).astype(np.int8)))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist()))
