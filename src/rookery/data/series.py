"""Time series from CSV files: one column a channel, rows in order of time, and the windows that are learned from."""

import csv
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import numpy as np

MISSING = frozenset({"", "na", "n/a", "nan", "null", "none"})
"""What files write where there is no value, in lower case."""


@dataclass(frozen=True)
class Table:
    """Channels side by side."""

    names: tuple[str, ...]
    """Of the channels."""
    values: np.ndarray
    """float64 [rows, channels], NaN where nothing was observed."""
    times: np.ndarray | None = None
    """datetime64[s] [rows], None where the file has no column of dates."""

    @property
    def step(self) -> float | None:
        """Seconds between rows (the median), None without dates."""
        if self.times is None or len(self.times) < 2:
            return None
        return float(np.median(np.diff(self.times).astype(np.float64)))

    def column(self, name: str) -> np.ndarray:
        """One channel [rows]; ValueError that lists the names if there is none such."""
        if name not in self.names:
            raise ValueError(f"there is no column {name!r}; the columns are {', '.join(self.names)}")
        return self.values[:, self.names.index(name)]


def read_table(path: str | os.PathLike[str]) -> Table:
    """A CSV file with a header. The first column is the time if its first value reads as a date, otherwise a channel.

    Raises ValueError that names row and column for what is no number, for infinite values and for dates that do not
    rise.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r}")
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file)
        header = next(rows, [])
        lines = [(number, row) for number, row in enumerate(rows, 2) if row]
    if not header or not lines:
        raise ValueError(f"{path}: expected a header and at least one row of values")
    dated = _date(lines[0][1][0]) is not None
    if dated and len(header) == 1:
        raise ValueError(f"{path}: there is a column of times and none of values")
    values = np.empty((len(lines), len(header) - dated))
    times = np.empty(len(lines), "datetime64[s]") if dated else None
    for i, (number, row) in enumerate(lines):
        where = f"{path}, line {number}"
        if len(row) != len(header):
            raise ValueError(f"{where}: {len(row)} values under {len(header)} column names")
        if times is not None:
            times[i] = _time(row[0], where)
        for j, text in enumerate(row[dated:]):
            values[i, j] = _number(text, where, header[j + dated])
    if times is not None and (late := np.flatnonzero(np.diff(times) <= np.timedelta64(0))).size:
        number, row = lines[int(late[0]) + 1]
        raise ValueError(f"{path}, line {number}: {row[0]} is not later than the row before; sort and deduplicate them")
    return Table(tuple(header[dated:]), values, times)


def _date(text: str) -> datetime | None:
    text = text.strip()
    if not any(mark in text for mark in "-/:") or text[:1] in "-+.":  # a number, not a date
        return None
    for form in (None, "%Y-%m", "%Y/%m/%d", "%Y/%m/%d %H:%M", "%Y/%m/%d %H:%M:%S", "%m/%d/%Y"):
        try:
            when = datetime.fromisoformat(text) if form is None else datetime.strptime(text, form)
        except ValueError:
            continue
        return when.replace(tzinfo=None)
    return None


def _time(text: str, where: str) -> np.datetime64:
    when = _date(text)
    if when is None:
        raise ValueError(f"{where}: {text!r} is no date, as the first row of this column is; write 2026-01-31 12:00:00")
    return np.datetime64(when, "s")


def _number(text: str, where: str, column: str) -> float:
    if text.strip().lower() in MISSING:
        return math.nan
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"{where}, column {column!r}: {text!r} is no number; leave missing values empty") from None
    if math.isinf(value):
        raise ValueError(f"{where}, column {column!r}: the value is infinite; leave missing values empty")
    return value


def future_times(table: Table, horizon: int) -> np.ndarray:
    """The times of the next rows, in step with those that are there; row numbers where the file has no dates.

    Months go on by months (from the last day of one to that of the next where all are last days), working days by
    working days, everything else by the seconds between rows. ValueError names the first row that is out of step: after
    a gap, or where the frequency changes.
    """
    if table.times is None:
        return np.arange(len(table.values), len(table.values) + horizon)
    times = table.times
    if len(times) < 2:
        raise ValueError("one row says nothing about the time between rows; give more of the history")
    regular = _in_step(times, len(times) + horizon)
    if (odd := np.flatnonzero(regular[: len(times)] != times)).size:
        row = int(odd[0])
        raise ValueError(
            f"row {row + 1} after the header is of {_text(times[row])} where {_text(regular[row])} should follow on "
            f"{_text(times[row - 1])}; forecasts need equal steps: add rows with empty values, or bring all to one step"
        )
    return regular[len(times) :]


def _in_step(times: np.ndarray, count: int) -> np.ndarray:
    """`count` times from the first of `times` on, in the step that most of these have."""
    ahead, days = np.arange(count), times.astype("datetime64[D]")
    step = np.median(np.diff(times).astype(np.int64)).astype("timedelta64[s]")
    months = days.astype("datetime64[M]")
    day = (days - months.astype("datetime64[D]")).astype(np.int64)
    last = (months + 1).astype("datetime64[D]") - 1 == days
    if step >= np.timedelta64(28, "D") and (last.all() or (day == day[0]).all()):
        every = int(np.median(np.diff(months).astype(np.int64)))
        month = months[0] + every * ahead
        found = (month + 1).astype("datetime64[D]") - 1 if last.all() else month.astype("datetime64[D]") + day[0]
        return found.astype("datetime64[s]") + (times[0] - days[0])
    weekend = (np.diff(days) == np.timedelta64(3, "D")).any()
    if step == np.timedelta64(1, "D") and weekend and np.is_busday(days).all():
        return np.busday_offset(days[0], ahead).astype("datetime64[s]") + (times[0] - days[0])
    return times[0] + ahead * step


def _text(time: np.datetime64) -> str:
    return str(time).replace("T", " ")


DAY = 86400
"""Seconds."""


def period_of(step: float | None) -> int:
    """Rows of a season for that many seconds between rows; 1 where nothing is known.

    A season is a day where rows divide it, a week of days, a year of weeks, months or quarters.
    """
    if step is None:
        return 1
    if step < DAY and DAY % step == 0:
        return round(DAY / step)
    if 28 * DAY <= step <= 31 * DAY:
        return 12
    if 89 * DAY <= step <= 92 * DAY:
        return 4
    return {DAY: 7, 7 * DAY: 52}.get(round(step), 1)


@dataclass(frozen=True)
class Splits:
    """Rows that are predicted in training, in validation and in the test; windows may look back across a border."""

    train: range
    validation: range
    test: range


ETT_MONTHS = (12, 4, 4)
"""Months of 30 days for training, validation and test in the ETT sets; what follows is not used."""


def standard_splits(table: Table) -> Splits:
    """The published borders: 12, 4 and 4 months for the ETT sets (known by length and step), else 70, 10 and 20%."""
    rows = len(table.values)
    hourly, quarterly = (rows, table.step) == (17420, 3600.0), (rows, table.step) == (69680, 900.0)
    if hourly or quarterly:
        month = 30 * 24 * (1 if hourly else 4)
        first, second, third = (month * sum(ETT_MONTHS[: i + 1]) for i in range(3))
        return Splits(range(first), range(first, second), range(second, third))
    train, test = int(0.7 * rows), int(0.2 * rows)
    return Splits(range(train), range(train, rows - test), range(rows - test, rows))


@dataclass(frozen=True)
class Scaler:
    """Mean and standard deviation of every channel over the rows of training."""

    mean: np.ndarray
    """[channels]"""
    deviation: np.ndarray
    """[channels], biased; 1 for a channel that never varies."""

    @staticmethod
    def of(values: np.ndarray) -> "Scaler":
        """Statistics of `values` [rows, channels] without what is missing."""
        deviation = np.nanstd(values, axis=0)
        return Scaler(np.nanmean(values, axis=0), np.where(deviation > 0, deviation, 1.0))

    def into(self, values: np.ndarray) -> np.ndarray:
        return (values - self.mean) / self.deviation


def scaled(table: Table, splits: Splits) -> Table:
    """The table with every channel scaled by the statistics of its training rows alone."""
    fitted = Scaler.of(table.values[splits.train.start : splits.train.stop])
    return replace(table, values=fitted.into(table.values))


class SeriesWindows:
    """All windows of `context` points and the `horizon` points after them, every channel a series of its own."""

    def __init__(self, values: np.ndarray, targets: range, context: int, horizon: int) -> None:
        """`values` [rows, channels]; `targets` are the rows that may be predicted. ValueError where no window fits."""
        self.values, self.context, self.horizon = values.astype(np.float32), context, horizon
        self.first = max(targets.start, context)
        self.count = targets.stop - horizon - self.first + 1
        if self.count < 1:
            raise ValueError(
                f"rows {targets.start} to {targets.stop} hold no window of {context} points of history and {horizon} "
                "to predict; give a longer series or a shorter lookback or horizon"
            )

    def __len__(self) -> int:
        return self.count

    def take(self, numbers: np.ndarray) -> np.ndarray:
        """Windows by number as series: float32 [windows · channels, context + horizon], channel after channel.

        Series without an observed value among their first `context` points are left out: nothing follows from nothing.
        """
        starts = self.first - self.context + np.asarray(numbers)
        rows = starts[:, None] + np.arange(self.context + self.horizon)
        windows = self.values[rows]  # [windows, points, channels]
        series = windows.transpose(0, 2, 1).reshape(-1, rows.shape[1])
        return series[~np.isnan(series[:, : self.context]).all(axis=1)]

    def batches(self, size: int) -> Iterator[np.ndarray]:
        """All windows in their order, `size` of them at a time, as `take` gives them."""
        for start in range(0, self.count, size):
            yield self.take(np.arange(start, min(start + size, self.count)))


def assert_no_overlap(windows: SeriesWindows, splits: Splits) -> None:
    """ValueError if a window's targets are among its inputs, or if validation or test rows come before training ones.

    Splits that shuffle rows, and targets that are the input shifted by one, make copying look like forecasting
    (timeseries.md 6.1).
    """
    borders = [splits.train.stop, splits.validation.start, splits.validation.stop, splits.test.start]
    if borders != sorted(borders):
        raise ValueError(f"the splits overlap or run backwards in time: {splits}")
    sample = windows.take(np.arange(min(200, len(windows))))
    context, target = sample[:, : windows.context], sample[:, windows.context :]
    copied = context[:, -windows.horizon :] if windows.context >= windows.horizon else np.resize(context, target.shape)
    shifted = np.concatenate([copied[:, 1:], copied[:, -1:]], axis=1)
    if _r2(shifted, target) > 0.9:
        raise ValueError("repeating the input shifted by one row explains the target: the target lies in the input")


def _r2(predicted: np.ndarray, actual: np.ndarray) -> float:
    seen = ~np.isnan(actual) & ~np.isnan(predicted)
    actual, predicted = actual[seen], predicted[seen]
    spread = np.square(actual - actual.mean()).sum()
    return float(1 - np.square(actual - predicted).sum() / spread) if spread else 0.0
