"""What a forecast of one series is: quantiles by point, with times where the history had them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rookery.errors import MissingDependency
from rookery.families.forecast import median_of
from rookery.plotting import require_matplotlib


@dataclass(frozen=True)
class Forecast:
    """The points to come of one series."""

    levels: tuple[float, ...]
    """Quantile levels, rising; empty where the model predicts one value."""
    values: np.ndarray
    """float32 [horizon, levels], or [horizon, 1] of a model without levels."""
    index: Any = None
    """Times [horizon] (a pandas index or datetime64), None where the history had none."""
    history: np.ndarray | None = None
    """The points it was made from, for plots."""
    item_id: str = ""
    """Name of the series."""

    @property
    def mean(self) -> np.ndarray:
        """float32 [horizon]: the median, or the one value of a model that was trained on squared errors."""
        return self.median

    @property
    def median(self) -> np.ndarray:
        """float32 [horizon]"""
        return self.values[:, median_of(self.levels)]

    def quantile(self, level: float | str) -> np.ndarray:
        """float32 [horizon], in a line between the levels that the model knows; ValueError beyond the outermost."""
        return quantiles(self.values, self.levels, [float(level)])[:, 0]

    def quantile_ts(self, level: float | str) -> Any:
        """The quantile as a pandas Series over `index`."""
        return pandas().Series(self.quantile(level), index=self.index, name=str(level))

    def to_df(self) -> Any:
        """A pandas table over `index` with "mean" and one column a level, named "0.1" and so on."""
        columns = {"mean": self.mean, **{str(level): self.values[:, i] for i, level in enumerate(self.levels)}}
        return pandas().DataFrame(columns, index=self.index)

    def plot(self, ax: Any = None, intervals: Sequence[float] = (0.5, 0.8), history: int = 200) -> Any:
        """Draws the last points of the history, the median and shaded central intervals; gives the axes."""
        ax = pyplot().subplots(figsize=(9, 4), layout="constrained")[1] if ax is None else ax
        before = np.empty(0) if self.history is None else self.history[-history:]
        ahead: Any = np.arange(len(self.values))
        if self.index is not None:
            ahead = np.asarray(self.index)
        step = ahead[1] - ahead[0] if len(ahead) > 1 else ahead[0] - ahead[0] + 1
        past = ahead[0] - step * np.arange(len(before), 0, -1)
        ax.plot(past, before, color="0.3", label="history")
        for share in sorted(intervals, reverse=True) if self.levels else ():
            low, high = quantiles(self.values, self.levels, [0.5 - share / 2, 0.5 + share / 2]).T
            ax.fill_between(ahead, low, high, color="C0", alpha=0.2, linewidth=0, label=f"{share:.0%}")
        ax.plot(ahead, self.median, color="C0", label="forecast")
        ax.set_title(self.item_id or None)
        ax.legend(loc="upper left", frameon=False)
        return ax


def quantiles(values: np.ndarray, known: Sequence[float], wanted: Sequence[float]) -> np.ndarray:
    """Quantiles [..., wanted] from those at the `known` levels [..., known], linear in the level between them."""
    if not known:
        raise ValueError(
            "the model predicts one value without quantiles; fit one with levels, as ForecastPipeline does"
        )
    for level in wanted:
        if not known[0] - 1e-9 <= level <= known[-1] + 1e-9:
            raise ValueError(f"level {level:g} lies outside of what the model predicts, {known[0]:g} to {known[-1]:g}")
    above = np.clip(np.searchsorted(known, np.asarray(wanted) - 1e-9), 1, max(1, len(known) - 1))
    if len(known) == 1:
        return np.repeat(values, len(wanted), axis=-1)
    low, high = np.asarray(known)[above - 1], np.asarray(known)[above]
    weight = ((np.asarray(wanted) - low) / (high - low)).clip(0, 1).astype(values.dtype)
    return values[..., above - 1] * (1 - weight) + values[..., above] * weight


def pandas() -> Any:
    """The pandas module, or an error that says how to get it."""
    try:
        import pandas
    except ModuleNotFoundError:
        raise MissingDependency('data frames need pandas: pip install "rookery[series]"') from None
    return pandas


def pyplot() -> Any:
    """matplotlib.pyplot, which shows what is drawn in a notebook, or an error that says how to get it."""
    require_matplotlib("series")
    import matplotlib.pyplot as plt

    return plt
