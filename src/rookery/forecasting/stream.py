"""A forecast that is kept up to date one value at a time, at a cost that does not depend on how many came before."""

import numpy as np
import torch
from torch import Tensor

from rookery.models.forecast import Forecaster, middle
from rookery.nn.patches import check_series, patches_of, scale_of


class ForecastStream:
    """The state of one series: push what was observed, ask for what is to come.

    The scale is that of the history it was opened with. Values wait until they make a patch; a forecast from within a
    patch completes it with what was predicted for it.
    """

    def __init__(self, model: Forecaster, context: np.ndarray) -> None:
        """`context` [points], NaN where missing. ValueError for models that carry no state from patch to patch."""
        if not model.streams:
            raise ValueError(
                f"{model.family} reads its whole context anew for every forecast; stream with rimer or timer"
            )
        self.model = model
        series = check_series(torch.as_tensor(np.asarray(context, np.float64))).to(model.like)
        self.scale = scale_of(series)
        self.waiting = series[:, :0]
        with torch.no_grad():
            predicted, self.state = model(patches_of(self.scale.into(series), model.config.patch_length))
        self.ahead = predicted[:, -1]

    @property
    def state_bytes(self) -> int:
        """Memory that the series takes: the same for ever with Rimer, more with every patch with Timer."""
        return self.state.nbytes

    @torch.no_grad()
    def push(self, values: np.ndarray | float) -> None:
        """Takes in what was observed next: one value or several, NaN where missing."""
        new = check_series(torch.as_tensor(np.atleast_1d(np.asarray(values, np.float64)))).to(self.model.like)
        self.waiting = torch.cat([self.waiting, self.scale.into(new)], dim=1)
        whole = self.waiting.shape[1] // self.model.config.patch_length * self.model.config.patch_length
        if whole:
            predicted, self.state = self.model(self.patches(self.waiting[:, :whole]), self.state)
            self.ahead, self.waiting = predicted[:, -1], self.waiting[:, whole:]

    @torch.no_grad()
    def forecast(self, horizon: int) -> np.ndarray:
        """The next `horizon` points, float32 [horizon, q] in the units of the series; the stream stays where it is."""
        if horizon < 1:
            raise ValueError(f"horizon must be at least 1 point, got {horizon}")
        begun, length = self.waiting.shape[1], self.model.config.patch_length
        if not begun:
            points = self.model.continued(self.ahead, self.state, horizon)
        else:  # what is known of the patch replaces what was predicted
            rest = self.ahead[:, begun:length]
            patch = torch.cat([self.waiting, middle(rest, self.model.config.levels)], dim=1)
            predicted, state = self.model(self.patches(patch), self.state)
            points = torch.cat([rest, self.model.continued(predicted[:, -1], state, horizon)], dim=1)[:, :horizon]
        return self.scale.out_of(points)[0].float().numpy()

    def patches(self, points: Tensor) -> Tensor:
        return points.unflatten(1, (-1, self.model.config.patch_length))
