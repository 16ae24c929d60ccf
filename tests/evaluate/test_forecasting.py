import numpy as np
import pytest
import torch
from support.data import shared
from support.series import randomised

from rookery.data.series import SeriesWindows, read_table, scaled, standard_splits
from rookery.errors import UnknownName
from rookery.evaluate.forecasting import Sums, evaluate, filled, persistence, profile, seasonal_naive
from rookery.models import save_model

NAIVE = {
    # set, horizon -> MSE and MAE of persistence, a day and a week repeated, and the profile (timeseries.md 5.3)
    ("ETTh1", 96): ((1.2944, 0.7132), (0.5122, 0.4333), (0.6570, 0.5086), (0.4000, 0.3998)),
    ("ETTh1", 720): ((1.3351, 0.7550), (0.6554, 0.5141), (0.6582, 0.5215), (0.4510, 0.4414)),
    ("ETTh2", 96): ((0.4317, 0.4216), (0.3905, 0.3802), (0.5824, 0.4847), (0.3497, 0.3781)),
    ("ETTh2", 720): ((0.5945, 0.5190), (0.5255, 0.4739), (0.5544, 0.4910), (0.4196, 0.4390)),
}
WINDOWS = {96: 2785, 192: 2689, 336: 2545, 720: 2161}


@pytest.mark.data
@pytest.mark.parametrize(("name", "horizon"), NAIVE)
def test_forecasts_without_learning_score_as_measured_elsewhere(name, horizon):
    path = shared(f"timeseries/{name}.csv")
    for (model, period), (mse, mae) in zip(
        (("persistence", None), ("seasonal-naive", None), ("seasonal-naive", 168), ("profile", None)),
        NAIVE[name, horizon],
    ):
        found = evaluate(model, path, 336, horizon, period=period)
        assert found["mse"] == pytest.approx(mse, abs=5.1e-5)
        assert found["mae"] == pytest.approx(mae, abs=5.1e-5)
        assert found["windows"] == WINDOWS[horizon]


@pytest.mark.data
def test_the_scaler_has_the_published_numbers():
    table = read_table(shared("timeseries/ETTh1.csv"))
    rows = table.values[standard_splits(table).train.start : standard_splits(table).train.stop]
    mean = [7.9377, 2.0210, 5.0798, 0.7462, 2.7818, 0.7885, 17.1283]
    deviation = [5.8127, 2.0901, 5.5188, 1.9264, 1.0235, 0.6302, 9.1765]
    np.testing.assert_allclose(rows.mean(axis=0), mean, atol=5.1e-5)
    np.testing.assert_allclose(rows.std(axis=0), deviation, atol=5.1e-5)


@pytest.mark.data
def test_training_has_the_published_number_of_windows():
    table = read_table(shared("timeseries/ETTh1.csv"))
    assert len(SeriesWindows(table.values, standard_splits(table).train, 336, 96)) == 8209


@pytest.fixture
def hourly(tmp_path):
    """Two days of period, three channels, some noise and a few gaps, as a file."""
    rng = np.random.default_rng(0)
    rows = 600
    values = np.sin(np.arange(rows) * 2 * np.pi / 24)[:, None] * [1, 2, 3] + 0.1 * rng.normal(size=(rows, 3))
    values[100:103, 1] = np.nan
    times = np.datetime64("2020-01-01", "s") + np.arange(rows) * np.timedelta64(3600, "s")
    lines = [f"{t},{','.join('' if np.isnan(v) else repr(float(v)) for v in row)}" for t, row in zip(times, values)]
    path = tmp_path / "hourly.csv"
    path.write_text("date,a,b,OT\n" + "\n".join(lines))
    return path


def test_the_batch_size_does_not_change_a_metric(hourly):
    one, other = (evaluate("profile", hourly, 48, 24, batch_size=size) for size in (1, 64))
    assert one == pytest.approx(other, rel=1e-12)


def test_a_season_repeated_beats_persistence_where_there_is_one(hourly):
    assert evaluate("seasonal-naive", hourly, 48, 24)["mse"] < evaluate("persistence", hourly, 48, 24)["mse"] / 5


def test_a_model_is_scored_as_a_loop_over_windows_scores_it(hourly, tmp_path):
    model = randomised("rimer-test", dtype=torch.float32)
    save_model(model, tmp_path / "m.safetensors")
    found = evaluate(str(tmp_path / "m.safetensors"), hourly, 32, 8)
    table = read_table(hourly)
    splits = standard_splits(table)
    values = scaled(table, splits).values.astype(np.float32)
    squared, absolute, covered, pinball, size = [], [], [], [], []
    for end in range(splits.test.start, splits.test.stop - 8 + 1):
        for channel in range(3):
            ahead = model.forecast(torch.from_numpy(values[end - 32 : end, channel]), 8)[0].numpy()
            actual = values[end : end + 8, channel]
            squared.append((ahead[:, 1] - actual) ** 2)
            absolute.append(np.abs(ahead[:, 1] - actual))
            covered.append((ahead[:, 0] <= actual) & (actual <= ahead[:, 2]))
            for i, level in enumerate((0.1, 0.5, 0.9)):
                pinball.append(np.maximum(level * (actual - ahead[:, i]), (level - 1) * (actual - ahead[:, i])))
            size.append(np.abs(actual))
    assert found["mse"] == pytest.approx(np.mean(squared), rel=1e-5)
    assert found["mae"] == pytest.approx(np.mean(absolute), rel=1e-5)
    assert found["coverage"] == pytest.approx(np.mean(covered), abs=1e-9)
    assert found["wql"] == pytest.approx(2 * np.sum(pinball) / (3 * np.sum(size)), rel=1e-5)


def test_missing_targets_do_not_count():
    sums = Sums()
    sums.add(np.array([[[1.0], [5.0]]]), np.array([[2.0, np.nan]]))
    assert sums.means() == {"mse": 1.0, "mae": 1.0}


def test_gaps_in_the_history_are_filled_from_before_or_else_from_behind():
    found = filled(np.array([[np.nan, 1.0, np.nan, 3.0, np.nan]]))
    np.testing.assert_array_equal(found, [[1, 1, 1, 3, 3]])


def test_baselines_repeat_what_they_say():
    history = np.arange(12.0)[None]
    np.testing.assert_array_equal(persistence(history, 3, 4), [[11, 11, 11]])
    np.testing.assert_array_equal(seasonal_naive(history, 6, 4), [[8, 9, 10, 11, 8, 9]])
    np.testing.assert_array_equal(profile(history, 5, 4), [[4, 5, 6, 7, 4]])


def test_an_unknown_forecaster_is_refused_with_the_nearest_name(hourly):
    with pytest.raises(UnknownName, match="Did you mean 'persistence'"):
        evaluate("persistance", hourly)
    with pytest.raises(ValueError, match="at least 1 row"):
        evaluate("persistence", hourly, 0, 5)
