import numpy as np
import pytest
import torch
from support.data import shared
from support.series import randomised

from rookery.data.series import SeriesWindows, read_table, scaled, standard_splits
from rookery.errors import UnknownName
from rookery.evaluate.forecasting import Sums, evaluate, filled, persistence, predictor, profile, seasonal_naive
from rookery.forecasting.fit import FitConfig, fit
from rookery.models import create_model, save_model

NAIVE = {
    # set, horizon -> MSE and MAE of persistence, a day and a week repeated, and the profile (timeseries.md 5.3)
    ("ETTh1", 96): ((1.2944, 0.7132), (0.5122, 0.4333), (0.6570, 0.5086), (0.4000, 0.3998)),
    ("ETTh1", 192): ((1.3249, 0.7331), (0.5808, 0.4692), (0.6620, 0.5127), (0.4459, 0.4225)),
    ("ETTh1", 336): ((1.3299, 0.7460), (0.6499, 0.5008), (0.6827, 0.5197), (0.4690, 0.4313)),
    ("ETTh1", 720): ((1.3351, 0.7550), (0.6554, 0.5141), (0.6582, 0.5215), (0.4510, 0.4414)),
    ("ETTh2", 96): ((0.4317, 0.4216), (0.3905, 0.3802), (0.5824, 0.4847), (0.3497, 0.3781)),
    ("ETTh2", 192): ((0.5337, 0.4725), (0.4819, 0.4285), (0.5794, 0.4872), (0.4009, 0.4133)),
    ("ETTh2", 336): ((0.5973, 0.5109), (0.5324, 0.4656), (0.5670, 0.4907), (0.4100, 0.4277)),
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


SCALERS = {
    # mean and deviation of the training rows (timeseries.md 5.2)
    "ETTh1": (
        [7.9377, 2.0210, 5.0798, 0.7462, 2.7818, 0.7885, 17.1283],
        [5.8127, 2.0901, 5.5188, 1.9264, 1.0235, 0.6302, 9.1765],
    ),
    "ETTh2": (
        [41.5368, 12.2735, 46.6098, 10.5262, 1.1870, -2.3732, 26.8720],
        [10.4488, 4.5871, 16.8582, 3.0186, 4.6410, 8.4609, 11.5847],
    ),
}


@pytest.mark.data
@pytest.mark.parametrize("name", SCALERS)
def test_the_scaler_has_the_published_numbers(name):
    mean, deviation = SCALERS[name]
    table = read_table(shared(f"timeseries/{name}.csv"))
    rows = table.values[standard_splits(table).train.start : standard_splits(table).train.stop]
    np.testing.assert_allclose(rows.mean(axis=0), mean, atol=5.1e-5)
    np.testing.assert_allclose(rows.std(axis=0), deviation, atol=5.1e-5)


@pytest.mark.data
def test_training_has_the_published_number_of_windows():
    table = read_table(shared("timeseries/ETTh1.csv"))
    assert len(SeriesWindows(table.values, standard_splits(table).train, 336, 96)) == 8209


@pytest.mark.data
def test_the_middle_of_trained_quantiles_holds_as_much_as_it_should():
    # timeseries.md 8.10; a small model and half a year, a pass over which takes seconds
    path = shared("timeseries/ETTh1.csv")
    table = read_table(path)
    values = scaled(table, standard_splits(table)).values
    sizes = {"hidden_size": 32, "head_dim": 16, "num_hidden_layers": 1, "dropout": 0.1, "levels": (0.1, 0.5, 0.9)}
    model = create_model("rimer", context_length=96, **sizes)
    train, validation = (SeriesWindows(values, rows, 96, 24) for rows in (range(4320, 8640), range(8640, 9000)))
    fit(model, train, validation, FitConfig(epochs=1, batch_size=32, lr=3e-3))
    found = evaluate(model, path, 96, 24, batch_size=256)
    assert 0.7 < found["coverage"] < 0.9
    assert found["mse"] < evaluate("seasonal-naive", path, 96, 24)["mse"]


@pytest.mark.data
def test_a_set_without_dates_has_no_season_and_its_published_persistence():
    found = evaluate("persistence", shared("timeseries/exchange_rate.csv"), 336, 96)
    assert (round(found["mse"], 3), round(found["mae"], 3)) == (0.081, 0.196)  # timeseries.md 5.4
    assert found["period"] == 1
    assert found["windows"] == 1517 - 96 + 1


@pytest.mark.data
def test_channels_that_begin_late_are_scored_where_they_are_observed():
    found = evaluate("seasonal-naive", shared("timeseries/ILINet.csv"), 104, 24)
    assert found["period"] == 52
    assert found["mse"] == pytest.approx(13.17, abs=0.005)


@pytest.mark.parametrize(
    ("rows", "channels", "minutes", "windows"),
    [
        (69680, 1, 15, 11520 - 24 + 1),  # ETTm: the borders depend on rows and step alone
        (2000, 21, 10, 400 - 24 + 1),  # Weather: as wide, but shorter
        (600, 321, 60, 120 - 24 + 1),  # electricity
        (300, 862, 60, 60 - 24 + 1),  # Traffic
    ],
)
def test_sets_that_are_not_here_are_scored_in_their_shapes(rows, channels, minutes, windows, tmp_path):
    times = np.datetime64("2016-07-01T00:00:00") + np.arange(rows) * np.timedelta64(minutes, "m")
    wave = np.sin(np.arange(rows) * minutes * 2 * np.pi / 1440)
    lines = [f"{t},{f'{w:.4f},' * (channels - 1)}{w + i % 3:.4f}" for i, (t, w) in enumerate(zip(times, wave))]
    path = tmp_path / "set.csv"
    path.write_text("date," + "".join(f"{i}," for i in range(channels - 1)) + "OT\n" + "\n".join(lines))
    found = evaluate("seasonal-naive", path, 144, 24)
    assert found["windows"] == windows
    assert found["period"] == 1440 // minutes
    assert found["mse"] < 1e-6


def test_many_channels_are_read_some_at_a_time(monkeypatch):
    model = randomised("rimer-test", dtype=torch.float32)
    histories = np.random.default_rng(0).normal(size=(7, 32)).astype(np.float32)
    whole = predictor(model, 8, 24)(histories)
    monkeypatch.setattr("rookery.evaluate.forecasting.AT_ONCE", 3)
    np.testing.assert_allclose(predictor(model, 8, 24)(histories), whole, rtol=1e-5, atol=1e-6)
    assert predictor(model, 8, 24)(histories[:0]).shape == (0, 8, 3)


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
