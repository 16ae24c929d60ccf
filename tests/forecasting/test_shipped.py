import numpy as np
import pytest
from support.data import shared

from rookery.evaluate.forecasting import evaluate
from rookery.evaluate.m4 import evaluate_m4
from rookery.forecasting.pipeline import SHIPPED, ForecastPipeline


def test_the_shipped_forecaster_is_small_and_knows_a_day():
    assert SHIPPED.stat().st_size < 2_000_000
    pipeline = ForecastPipeline.from_pretrained()
    hours = np.arange(24 * 16)
    wave = 10 + np.sin(2 * np.pi * hours / 24) + 0.3 * np.sin(2 * np.pi * hours / 12)
    ahead = pipeline.predict(wave[:-48], 48)
    assert np.abs(ahead.median - wave[-48:]).mean() < 0.15
    assert (ahead.quantile(0.1) < ahead.quantile(0.9)).all()


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.parametrize(("name", "lookback", "horizon", "mse"), [("ETTh1", 480, 96, 0.384), ("ETTh2", 480, 96, 0.314)])
def test_the_table_of_its_card_holds(name, lookback, horizon, mse):
    found = evaluate(str(SHIPPED), shared(f"timeseries/{name}.csv"), lookback, horizon)
    assert found["mse"] == pytest.approx(mse, abs=2e-3)


@pytest.mark.data
@pytest.mark.slow
def test_the_row_of_m4_in_its_card_holds():
    found = evaluate_m4(str(SHIPPED), shared("timeseries/M4_Hourly-train.csv"), shared("timeseries/M4_Hourly-test.csv"))
    assert found["smape"] == pytest.approx(15.88, abs=0.05)
