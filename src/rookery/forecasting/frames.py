"""Data frames in long form (item, time, value) as series, and forecasts as data frames."""

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np

from rookery.forecasting.result import pandas


@dataclass(frozen=True)
class Item:
    """One series of a frame."""

    name: Any
    values: np.ndarray
    """float64 [points]"""
    times: Any
    """pandas DatetimeIndex [points]"""
    freq: Any
    """pandas offset from one point to the next"""

    def future(self, horizon: int) -> Any:
        """The times of the next points."""
        return pandas().date_range(self.times[-1], periods=horizon + 1, freq=self.freq)[1:]


def items_of(
    frame: Any, item: str | None, time: str, target: str, freq: str | None = None, validate: bool = True
) -> list[Item]:
    """The series of a frame in the order in which they first appear, each sorted by time.

    ValueError names the item and what is wrong with it: a missing column, times that repeat, leave out a step or follow
    another frequency than `freq` (or that of the first item), infinite values, nothing but missing values.
    """
    for column in (time, target, *([item] if item else [])):
        if column not in frame.columns:
            raise ValueError(f"there is no column {column!r}; the columns are {', '.join(map(str, frame.columns))}")
    groups = frame.groupby(item, sort=False) if item else [("", frame)]
    found = []
    for name, group in groups:
        series = _item(name, group, time, target, freq, validate)
        freq = freq or series.freq
        found.append(series)
    if not found:
        raise ValueError("the frame has no rows")
    return found


def _item(name: Any, group: Any, time: str, target: str, freq: Any, validate: bool) -> Item:
    pd = pandas()
    where = f"item {name!r}: " if name != "" else ""
    times = pd.DatetimeIndex(pd.to_datetime(group[time]))
    order = np.argsort(times.to_numpy(), kind="stable")
    times, values = times[order], pd.to_numeric(group[target]).to_numpy(np.float64, na_value=np.nan)[order]
    if validate:
        if times.isna().any():
            raise ValueError(f"{where}a row has no time")
        if times.has_duplicates:
            raise ValueError(f"{where}{times[times.duplicated()][0]} appears more than once")
        if np.isinf(values).any():
            raise ValueError(
                f"{where}the value at {times[np.isinf(values)][0]} is infinite; leave missing values empty"
            )
        if np.isnan(values).all():
            raise ValueError(f"{where}every value is missing")
    step = freq or _frequency(times, where)
    if validate:
        whole = pd.date_range(times[0], times[-1], freq=step)
        if len(whole.difference(times)):
            raise ValueError(
                f"{where}{whole.difference(times)[0]} is missing (step {_named(step)}); add the row with an empty value"
            )
        if len(times.difference(whole)):
            raise ValueError(f"{where}{times.difference(whole)[0]} is off the step {_named(step)} of the other times")
    return Item(name, values, times, pd.tseries.frequencies.to_offset(step))


def _frequency(times: Any, where: str) -> Any:
    pd = pandas()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pandas 3 announces that it will give an offset, which will do as well
        found = pd.infer_freq(times) if len(times) >= 3 else None
    if found:
        return found
    if len(times) < 2:
        raise ValueError(f"{where}one row says nothing about the time between rows; give freq")
    # with a gap somewhere nothing is inferred from all of them: the most usual step, and the gap is found by it
    return pd.Series(times).diff().mode()[0]


def _named(step: Any) -> str:
    return str(getattr(step, "freqstr", step))
