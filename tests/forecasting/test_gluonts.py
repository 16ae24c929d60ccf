import numpy as np
import pytest
import torch
from support.series import randomised

from rookery.errors import MissingDependency
from rookery.forecasting.gluonts import gluonts_predictor
from rookery.forecasting.pipeline import ForecastPipeline


def pipeline():
    return ForecastPipeline(randomised("rimer-test", dtype=torch.float32))


def test_without_gluonts_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gluonts.model.forecast", None)
    with pytest.raises(MissingDependency, match="pip install gluonts"):
        gluonts_predictor(pipeline(), 5)


@pytest.mark.filterwarnings("ignore")  # gluonts' own
def test_gluonts_can_evaluate_our_forecasts():
    pytest.importorskip("gluonts", reason="needs gluonts: pip install gluonts")
    import pandas as pd
    from gluonts.dataset.common import ListDataset
    from gluonts.evaluation import Evaluator, make_evaluation_predictions

    target = np.sin(np.arange(80) / 4)
    dataset = ListDataset([{"item_id": "a", "start": pd.Period("2024-01-01", "h"), "target": target}], freq="h")
    ours = gluonts_predictor(pipeline(), 12)
    forecasts, actual = make_evaluation_predictions(dataset, predictor=ours)
    (forecast,) = forecasts
    assert forecast.start_date == pd.Period("2024-01-01", "h") + 68
    want = pipeline().predict(target[:68], 12)
    np.testing.assert_allclose(forecast.quantile(0.9), want.quantile(0.9), rtol=1e-6)
    scores, _ = Evaluator(quantiles=[0.1, 0.5, 0.9], num_workers=0)(list(actual), [forecast])
    assert np.isfinite(scores["mean_wQuantileLoss"])
