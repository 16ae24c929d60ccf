"""DLinear (arXiv 2205.13504): two linear maps from history to horizon; no state, no patches, hard to beat."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool1d, pad

from rookery.families.dlinear import DLinearConfig
from rookery.models.forecast import Forecaster, in_order
from rookery.nn.patches import Scale
from rookery.state import State

# b series, k points predicted, q values a point


class Nothing(NamedTuple):
    """What a model without memory remembers."""


class DLinear(Forecaster):
    """Trend and remainder of the history, each mapped to the horizon by one matrix that all channels share.

    The only one here that does not bring every series to its own scale: it reads what it is given, as published.
    """

    family = "dlinear"
    streams = False
    fingerprinted = ("trend.weight", "remainder.bias")

    def __init__(self, config: DLinearConfig) -> None:
        super().__init__()
        self.config = config
        points = config.horizon * config.outputs
        self.trend = nn.Linear(config.context_length, points)
        self.remainder = nn.Linear(config.context_length, points)

    def forward(self, patches: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """What follows the one patch [b, 1, context_length] that is the history, as [b, 1, horizon, q]."""
        if state is not None or list(patches.shape[1:]) != [1, self.config.context_length]:
            raise ValueError(f"DLinear reads one patch of {self.config.context_length} points and takes no state")
        x = patches.nan_to_num(nan=0.0)
        trend = avg_pool1d(pad(x, [self.config.kernel // 2] * 2, mode="replicate"), self.config.kernel, stride=1)
        predicted = (self.trend(trend) + self.remainder(x - trend)).unflatten(-1, (-1, self.config.outputs))
        return in_order(predicted, self.config.levels), self.init_state(len(x))

    def cut(self, context: Tensor) -> Tensor:
        """The last `context_length` points as one patch; the first value is repeated before a shorter history."""
        missing = max(0, self.config.context_length - context.shape[1])
        return pad(context[:, None, -self.config.context_length :], (missing, 0), mode="replicate")

    def scale(self, history: Tensor) -> Scale:
        one = history.new_ones(len(history), 1)
        return Scale(torch.zeros_like(one), one, one.bool())

    def empty_layer(self, batch: int) -> Nothing:
        return Nothing()

    @torch.no_grad()
    def init_weights(self, seed: int | None = None) -> None:
        """Every weight 1 / context_length, which makes both maps the mean of the history; biases 0."""
        for linear in (self.trend, self.remainder):
            linear.weight.fill_(1 / self.config.context_length)
            linear.bias.zero_()
