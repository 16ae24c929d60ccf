import numpy as np
import pytest
import torch
from support.series import randomised

from rookery.errors import MissingDependency
from rookery.forecasting.darts import darts_model
from rookery.forecasting.pipeline import ForecastPipeline


def pipeline():
    return ForecastPipeline(randomised("rimer-test", dtype=torch.float32))


def test_without_darts_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "darts", None)
    with pytest.raises(MissingDependency, match="pip install darts"):
        darts_model(pipeline())


needs_darts = pytest.mark.filterwarnings("ignore")  # Darts' own


@pytest.fixture
def series():
    """Two components over 80 hours."""
    pytest.importorskip("darts", reason="needs darts: pip install darts")
    import pandas as pd
    from darts import TimeSeries

    values = np.stack([np.sin(np.arange(80) / 4), np.arange(80) % 7], axis=1).astype(np.float32)
    return TimeSeries.from_times_and_values(
        pd.date_range("2024-01-01", periods=80, freq="h"), values, columns=["a", "b"]
    )


@needs_darts
def test_darts_gets_what_the_pipeline_predicts(series):
    import pandas as pd

    model = darts_model(pipeline())
    found = model.fit(series).predict(12)
    assert found.start_time() == series.end_time() + pd.Timedelta(hours=1)
    for name in ("a", "b"):
        want = pipeline().predict(series[name].values()[:, 0], 12)
        np.testing.assert_allclose(found[name].values()[:, 0], want.median, rtol=1e-6)
    quantiles = model.predict(8, series=series["b"], predict_likelihood_parameters=True)
    assert list(quantiles.components) == ["b_q0.10", "b_q0.50", "b_q0.90"]
    assert (np.diff(quantiles.values(), axis=1) >= 0).all()
    one, other = model.predict(3, series=[series["a"], series["b"][:40]])
    assert other.start_time() == series.start_time() + pd.Timedelta(hours=40)
    assert len(one) == 3


@needs_darts
def test_darts_looks_back_as_we_do(series):
    model = darts_model(pipeline()).fit(series["a"])
    found = model.historical_forecasts(
        series["a"], start=60, forecast_horizon=5, stride=5, retrain=False, last_points_only=False
    )
    ours = pipeline().historical_forecasts(series["a"].values()[:, 0], 5, stride=5, start=60, last_points_only=False)
    assert len(found) == len(ours) == 4
    for theirs, own in zip(found, ours):
        np.testing.assert_allclose(theirs.values()[:, 0], own.median, rtol=1e-6)


@needs_darts
def test_what_darts_may_ask_and_we_have_not_is_refused(series):
    model = darts_model(pipeline()).fit(series)
    with pytest.raises(ValueError, match="reads no covariates"):
        model.predict(3, past_covariates=series)
    with pytest.raises(ValueError, match="num_samples > 1"):
        model.predict(3, num_samples=10)
