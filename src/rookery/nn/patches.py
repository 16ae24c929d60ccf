"""Series as rows of patches, and the numbers that bring every series to the same scale."""

from typing import NamedTuple

import torch
from torch import Tensor

# b series, l points, n patches, p points of a patch

EPSILON = 1e-5
"""Added to the variance, as in Timer (models/Timer.py)."""


class Scale(NamedTuple):
    """Mean and deviation of each series, over what was observed of it."""

    mean: Tensor
    """[b, 1]"""
    deviation: Tensor
    """[b, 1], √(biased variance + 1e-5)"""
    varies: Tensor
    """bool [b, 1], false for a series that has one value only"""

    def into(self, series: Tensor) -> Tensor:
        """`series` [b, l] as the model sees it."""
        return (series - self.mean) / self.deviation

    def out_of(self, predicted: Tensor) -> Tensor:
        """Predictions [b, l, q] in the units of the series; a series that never varied goes on as it was."""
        deviation = self.deviation * self.varies
        return predicted * deviation[..., None] + self.mean[..., None]


def scale_of(series: Tensor) -> Scale:
    """Statistics of the points that are there (not NaN) of each series [b, l]; ValueError where there are none."""
    observed = ~series.isnan()
    count = observed.sum(dim=1, keepdim=True)
    if not bool(count.all()):
        empty = (count[:, 0] == 0).nonzero()[:, 0].tolist()
        raise ValueError(f"series {empty[0]} has no observed value to forecast from; every point of it is missing")
    values = series.nan_to_num(nan=0.0)
    mean = values.sum(dim=1, keepdim=True) / count
    variance = ((values - mean).square() * observed).sum(dim=1, keepdim=True) / count
    low = series.nan_to_num(nan=torch.inf).amin(dim=1, keepdim=True)
    high = series.nan_to_num(nan=-torch.inf).amax(dim=1, keepdim=True)
    return Scale(mean, (variance + EPSILON).sqrt(), high > low)


def patches_of(series: Tensor, length: int) -> Tensor:
    """[b, n, length] from [b, l]; NaN is put before a series that makes no whole number of patches."""
    missing = -series.shape[1] % length
    if missing:
        series = torch.cat([series.new_full((series.shape[0], missing), torch.nan), series], dim=1)
    return series.unflatten(1, (-1, length))


def check_series(series: Tensor) -> Tensor:
    """A batch of series [b, l], one series [l] made a batch; ValueError for infinite values and for no points."""
    if series.dim() == 1:
        series = series[None]
    if series.dim() != 2 or series.shape[1] == 0:
        raise ValueError(f"series must be [batch, points] with at least one point, got shape {list(series.shape)}")
    if series.isinf().any():
        row, place = series.isinf().nonzero()[0].tolist()
        raise ValueError(f"point {place} of series {row} is infinite; use NaN for a value that is missing")
    return series
