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

    ValueError names the item, the row (by its label in the frame) and what is wrong with it: a missing column, values
    that are no numbers or infinite, times that cannot be read, repeat, leave out a step or follow another frequency
    than `freq` (or that of the first item), nothing but missing values.
    """
    if not hasattr(frame, "columns"):
        raise ValueError(f"expected a pandas data frame, got {type(frame).__name__}; predict_quantiles takes arrays")
    for column in (time, target, *([item] if item else [])):
        if list(frame.columns).count(column) != 1:
            how = "are two columns" if column in frame.columns else "is no column"
            raise ValueError(f"there {how} {column!r}; the columns are {', '.join(map(str, frame.columns))}")
    if not len(frame):
        raise ValueError("the frame has no rows")
    if item and frame[item].isna().any():
        raise ValueError(f"row {frame.index[frame[item].isna()][0]} has no {item}")
    found = []
    for name, group in frame.groupby(item, sort=False) if item else [("", frame)]:
        series = _item(name, group, time, target, freq, validate)
        freq = freq or series.freq
        found.append(series)
    return found


def _item(name: Any, group: Any, time: str, target: str, freq: Any, validate: bool) -> Item:
    pd = pandas()
    where = f"item {name!r}: " if name != "" else ""
    times, values = _times(group[time], where), _values(group[target], where)
    order = np.argsort(times.to_numpy(), kind="stable")
    times, values, labels = times[order], values[order], group.index[order]
    if validate:
        if times.has_duplicates:
            again = times.duplicated()
            raise ValueError(f"{where}row {labels[again][0]}: {times[again][0]} appears more than once")
        if np.isnan(values).all():
            raise ValueError(f"{where}every value is missing")
    step = freq or _frequency(times, where)
    if validate:
        whole = pd.date_range(times[0], times[-1], freq=step)
        if len(gaps := whole.difference(times)):
            raise ValueError(f"{where}{gaps[0]} is missing (step {_named(step)}); add the row with an empty value")
        if len(odd := times.difference(whole)):
            row = labels[times == odd[0]][0]
            raise ValueError(f"{where}row {row}: {odd[0]} is off the step {_named(step)} of the other times")
    return Item(name, values, times, pd.tseries.frequencies.to_offset(step))


def _times(column: Any, where: str) -> Any:
    pd = pandas()
    if pd.api.types.is_numeric_dtype(column):
        raise ValueError(
            f"{where}{column.name!r} holds numbers, not times; make them times with pandas.to_datetime, "
            "or give the values to predict_quantiles"
        )
    times = pd.DatetimeIndex(pd.to_datetime(column, errors="coerce"))
    if (bad := times.isna()).any():
        raise ValueError(f"{where}row {column.index[bad][0]}: {column[bad].iloc[0]!r} is no time")
    return times


def _values(column: Any, where: str) -> np.ndarray:
    pd = pandas()
    values = pd.to_numeric(column, errors="coerce").to_numpy(np.float64, na_value=np.nan)
    for bad, what in ((np.isnan(values) & column.notna().to_numpy(), "no number"), (np.isinf(values), "infinite")):
        if bad.any():
            row, value = column.index[bad][0], column[bad].iloc[0]
            raise ValueError(f"{where}row {row}: the value {value} is {what}; leave missing values empty")
    return values


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
