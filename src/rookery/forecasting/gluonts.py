"""Our forecasters behind the interface of GluonTS, so that its evaluation and plots work on them."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from rookery.errors import MissingDependency
from rookery.forecasting.pipeline import ForecastPipeline

if TYPE_CHECKING:
    from gluonts.model.predictor import Predictor


def gluonts_predictor(pipeline: ForecastPipeline, prediction_length: int) -> "Predictor":
    """A GluonTS predictor: `predict(dataset)` gives a QuantileForecast for every entry, with `item_id` and start.

    Entries are dictionaries with "target" [points] (NaN where missing) and "start" (a pandas Period).
    """
    try:
        from gluonts.model.forecast import QuantileForecast
        from gluonts.model.predictor import Predictor
    except ModuleNotFoundError:
        raise MissingDependency("GluonTS is not installed: pip install gluonts") from None

    class RookeryPredictor(Predictor):
        """A ForecastPipeline as GluonTS knows predictors."""

        def predict(self, dataset: Iterable[dict[str, Any]], **_: Any) -> Iterator[QuantileForecast]:
            levels = pipeline.model.config.levels or (0.5,)
            for entry in dataset:
                target = np.asarray(entry["target"], np.float32)
                yield QuantileForecast(
                    forecast_arrays=pipeline.predict(target, self.prediction_length).values.T,
                    start_date=entry["start"] + len(target),
                    forecast_keys=[str(level) for level in levels],
                    item_id=entry.get("item_id"),
                )

    return RookeryPredictor(prediction_length)
