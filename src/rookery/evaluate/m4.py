"""The hourly set of the M4 competition (Makridakis et al. 2020): a row a series, the next 48 hours in a second file."""

import csv
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from rookery.data.series import Scaler
from rookery.evaluate.forecasting import CanForecast, levels_of, predictor, resolved
from rookery.families.forecast import median_of

PERIOD, HORIZON = 24, 48
NAIVE2 = {"smape": 18.383, "mase": 2.395}
"""Errors of the competition's benchmark on the hourly series, as published; OWA is relative to it."""


def read_m4(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Series by name, each without the empty cells at its end; ValueError names a row that holds no numbers."""
    found = {}
    with Path(path).open(encoding="utf-8", newline="") as file:
        rows = csv.reader(file)
        next(rows, None)
        for number, (name, *cells) in enumerate(rows, 2):
            try:
                found[name] = np.array([float(cell) for cell in cells if cell], np.float64)
            except ValueError:
                raise ValueError(f"{path}, line {number} ({name}): a value is no number") from None
    if not found:
        raise ValueError(f"{path}: no series; expected a header and one row for each")
    return found


def side_by_side(series: Mapping[str, np.ndarray]) -> np.ndarray:
    """The series as columns, float64 [points of the longest, series]: all end in one row, NaN before shorter ones."""
    longest = max(len(values) for values in series.values())
    return np.stack([np.pad(v, (longest - len(v), 0), constant_values=np.nan) for v in series.values()], axis=1)


def evaluate_m4(
    model: CanForecast | str,
    train_csv: str | os.PathLike[str],
    test_csv: str | os.PathLike[str],
    *,
    lookback: int = 480,
) -> dict[str, float]:
    """sMAPE (in %), MASE and OWA of a forecaster (see `evaluate`) on the hourly series, and their number.

    The model sees the last `lookback` hours of each series, scaled by the mean and deviation of what is known of it.
    MASE is in units of the seasonal naive error inside the training part, OWA is the mean of both errors relative to
    the competition's Naive2.
    """
    train, test = read_m4(train_csv), read_m4(test_csv)
    if train.keys() != test.keys():
        odd = sorted(train.keys() ^ test.keys())
        raise ValueError(f"series {odd[0]!r} is in one of the two files only")
    model = resolved(model)
    values = side_by_side(train)
    scaler = Scaler.of(values)
    found = predictor(model, HORIZON, PERIOD)(scaler.into(values)[-lookback:].T.astype(np.float32))
    centre = found[..., median_of(levels_of(model))] * scaler.deviation[:, None] + scaler.mean[:, None]
    smape, mase = [], []
    for predicted, series, actual in zip(centre, train.values(), test.values()):
        error = np.abs(predicted - actual)
        smape.append(np.mean(2 * error / (np.abs(predicted) + np.abs(actual))))
        mase.append(error.mean() / np.abs(series[PERIOD:] - series[:-PERIOD]).mean())
    means = {"smape": 100 * float(np.mean(smape)), "mase": float(np.mean(mase))}
    return {**means, "owa": float(np.mean([means[key] / NAIVE2[key] for key in NAIVE2])), "series": len(train)}
