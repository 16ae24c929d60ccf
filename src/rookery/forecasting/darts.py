"""Our forecasters as models of Darts, so that its historical forecasts, backtests and plots work on them."""

from typing import TYPE_CHECKING, Any

import numpy as np

from rookery.errors import MissingDependency
from rookery.forecasting.inputs import whole
from rookery.forecasting.pipeline import ForecastPipeline

if TYPE_CHECKING:
    from darts import TimeSeries
    from darts.models.forecasting.forecasting_model import GlobalForecastingModel


def darts_model(pipeline: ForecastPipeline) -> "GlobalForecastingModel":
    """A global Darts model: `predict(n, series=...)` gives the medians of a series, component by component.

    With `predict_likelihood_parameters=True` it gives one component for each of the forecaster's levels, named
    "load_q0.10". `fit` remembers the series to go on from and changes no weight: train with `ForecastPipeline.fit`.
    Covariates and several samples are refused, as Darts does for models without them.
    """
    try:
        from darts import TimeSeries
        from darts.models.forecasting.forecasting_model import GlobalForecastingModel
    except ModuleNotFoundError:
        raise MissingDependency("Darts is not installed: pip install darts") from None

    config = pipeline.model.config

    class RookeryModel(GlobalForecastingModel):
        """A ForecastPipeline as Darts knows models."""

        supports_multivariate = True
        supports_past_covariates = False
        supports_future_covariates = False
        supports_likelihood_parameter_prediction = bool(config.levels)
        _supports_non_retrainable_historical_forecasts = True
        min_train_samples = 1
        extreme_lags = (-1, config.reach - 1, None, None, None, None, 0)
        _target_window_lengths = (1, config.reach)
        _model_encoder_settings = (None, None, False, False, None, None)

        def fit(self, series: Any, past_covariates: Any = None, future_covariates: Any = None, verbose: Any = None):
            if past_covariates is not None or future_covariates is not None:
                raise ValueError("this forecaster reads no covariates; give it the series alone")
            return super().fit(series)

        def predict(
            self,
            n: int,
            series: Any = None,
            past_covariates: Any = None,
            future_covariates: Any = None,
            num_samples: int = 1,
            verbose: Any = None,
            predict_likelihood_parameters: bool = False,
            show_warnings: bool = True,
            random_state: int | None = None,
        ) -> "TimeSeries | list[TimeSeries]":
            if past_covariates is not None or future_covariates is not None:
                raise ValueError("this forecaster reads no covariates; give it the series alone")
            given = self.training_series if series is None else series
            super().predict(n, given, num_samples=num_samples, show_warnings=show_warnings)
            one = isinstance(given, TimeSeries)
            with_levels = predict_likelihood_parameters and bool(config.levels)
            found = [self.after(some, whole("n", n), with_levels) for some in ([given] if one else given)]
            return found[0] if one else found

        @staticmethod
        def after(series: "TimeSeries", n: int, with_levels: bool) -> "TimeSeries":
            """The next `n` points of each component, or all levels of each."""
            names = [str(name) for name in series.components]
            forecasts = [pipeline.predict(column, n, item_id=name) for name, column in zip(names, series.values().T)]
            if with_levels:
                columns = np.concatenate([forecast.values for forecast in forecasts], axis=1)
                names = [f"{name}_q{level:.2f}" for name in names for level in config.levels]
            else:
                columns = np.stack([forecast.median for forecast in forecasts], axis=1)
            return TimeSeries.from_times_and_values(_following(series, n), columns, columns=names)

    return RookeryModel()


def _following(series: "TimeSeries", count: int) -> Any:
    """The next `count` times of the series: dates, or whole numbers where Darts counts rows."""
    import pandas as pd

    start = series.end_time() + series.freq
    if isinstance(start, pd.Timestamp):
        return pd.date_range(start, periods=count, freq=series.freq)
    return pd.RangeIndex(start, start + count * series.freq, series.freq)
