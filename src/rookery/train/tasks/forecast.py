"""Predict the points that follow each patch of a series."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import huber_loss

from rookery.models.forecast import Forecaster, middle

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
