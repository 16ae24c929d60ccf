import numpy as np
import pandas as pd
import pytest
import torch
from support.series import randomised, some_series

from rookery.forecasting.fit import FitConfig, one_cycle
from rookery.forecasting.pipeline import ForecastPipeline
from rookery.forecasting.result import Forecast, quantiles
from rookery.models import create_model

HOURS = np.datetime64("2024-03-30", "h")


@pytest.fixture(scope="module")
def pipeline():
    return ForecastPipeline(randomised("rimer-test", dtype=torch.float32))


def series(length, seed=0):
    return np.random.default_rng(seed).normal(size=length).cumsum().astype(np.float32)


def frame(lengths, start=HOURS):
    parts = [
        pd.DataFrame({"item_id": name, "timestamp": start + np.arange(n), "target": series(n, seed)})
        for seed, (name, n) in enumerate(lengths.items())
    ]
    return pd.concat(parts, ignore_index=True)


# predicting


def test_series_of_unequal_length_are_forecast_as_each_alone(pipeline):
    some = [series(9), series(30, 1), series(33, 2)]
    found, means = pipeline.predict_quantiles(some, 10, [0.1, 0.5, 0.9])
    assert found.shape == (3, 10, 3)
    assert means.shape == (3, 10)
    assert torch.equal(means, found[..., 1])
    for i, one in enumerate(some):
        alone = pipeline.predict_quantiles(one, 10, [0.1, 0.5, 0.9])[0][0]
        torch.testing.assert_close(alone, found[i], rtol=1e-5, atol=1e-5)
    padded = np.full((3, 33), np.nan, np.float32)
    for row, one in zip(padded, some):
        row[-len(one) :] = one
    torch.testing.assert_close(pipeline.predict_quantiles(padded, 10, [0.1, 0.5, 0.9])[0], found)


def test_only_the_last_context_is_read(pipeline):
    long = series(200)
    torch.testing.assert_close(
        pipeline.predict_quantiles(long, 8, [0.5])[0], pipeline.predict_quantiles(long[-32:], 8, [0.5])[0]
    )


def test_levels_between_the_known_ones_lie_on_a_line():
    values = np.array([[0.0, 10.0, 30.0]])
    np.testing.assert_allclose(quantiles(values, (0.1, 0.5, 0.9), [0.1, 0.3, 0.5, 0.6, 0.9]), [[0, 5, 10, 15, 30]])


def test_levels_that_nothing_is_known_of_are_refused(pipeline):
    with pytest.raises(ValueError, match=r"level 0.95 lies outside of what the model predicts, 0.1 to 0.9"):
        pipeline.predict_quantiles(series(40), 4, [0.95])
    point = ForecastPipeline(create_model("rimer-test", levels=()))
    with pytest.raises(ValueError, match="one value without quantiles"):
        point.predict_quantiles(series(40), 4, [0.5])
    assert point.predict(series(40), 4).median.shape == (4,)


# data frames


def test_a_frame_gives_a_frame(pipeline):
    found = pipeline.predict_df(frame({"b": 40, "a": 50}), prediction_length=5, quantile_levels=[0.1, 0.9])
    assert list(found.columns) == ["item_id", "timestamp", "target_name", "predictions", "0.1", "0.9"]
    assert found["item_id"].tolist() == ["b"] * 5 + ["a"] * 5  # in order of first appearance
    assert found["timestamp"][0] == pd.Timestamp(HOURS) + pd.Timedelta(hours=40)
    assert (found["0.1"] <= found["predictions"]).all()
    want = pipeline.predict_quantiles(series(40), 5, [0.1])[0][0, :, 0]
    np.testing.assert_allclose(found["0.1"][:5], want, rtol=1e-5, atol=1e-5)


def test_the_order_of_the_rows_does_not_matter(pipeline):
    rows = frame({"a": 40, "b": 40})
    shuffled = pd.concat([rows.iloc[:1], rows.iloc[1:].sample(frac=1, random_state=0)])
    one, other = (pipeline.predict_df(f, prediction_length=6, batch_size=1) for f in (rows, shuffled))
    pd.testing.assert_frame_equal(one, other)


@pytest.mark.parametrize(("freq", "last"), [("D", "2024-02-03"), ("MS", "2027-06-01"), ("15min", "2024-01-01 08:15")])
def test_times_go_on_with_the_frequency_that_was_inferred(pipeline, freq, last):
    times = pd.date_range("2024-01-01", periods=32, freq=freq)
    rows = pd.DataFrame({"timestamp": times, "target": series(32)})
    found = pipeline.predict_df(rows, prediction_length=2 if freq != "MS" else 10)
    assert found["timestamp"].iloc[-1] == pd.Timestamp(last)


def broken(change):
    rows = frame({"a": 40, "b": 40})
    return change(rows) if change else rows


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda f: f.drop(index=60), r"item 'b': 2024-03-30 20:00:00 is missing \(step "),
        (lambda f: pd.concat([f, f.iloc[50:51]]), r"item 'b': row 50: 2024-03-30 10:00:00 appears more than once"),
        (lambda f: f[(f.item_id == "a") | (f.index % 2 == 0)], r"item 'b': .* is missing \(step h\)"),
        (lambda f: f[(f.item_id == "b") | (f.index % 2 == 0)], r"item 'b': row 41: .* 01:00:00 is off the step 2h"),
        (
            lambda f: f.assign(target=f.target.where(f.index != 3, np.inf)),
            r"item 'a': row 3: the value inf is infinite",
        ),
        (
            lambda f: f.assign(target=f.target.astype(object).where(f.index != 43, "x")),
            r"item 'b': row 43: .* x is no nu",
        ),
        (lambda f: f.assign(target=f.target.where(f.item_id != "b")), r"item 'b': every value is missing"),
        (lambda f: f.assign(timestamp=f.timestamp.where(f.index != 45)), r"item 'b': row 45: NaT is no time"),
        (lambda f: f.assign(timestamp=f.index), r"item 'a': 'timestamp' holds numbers, not times"),
        (lambda f: f.assign(item_id=f.item_id.where(f.index != 5)), r"row 5 has no item_id"),
        (lambda f: f.rename(columns={"target": "OT"}), r"no column 'target'; the columns are item_id"),
        (lambda f: pd.concat([f, f[["target"]]], axis=1), r"there are two columns 'target'"),
        (lambda f: f.iloc[:1], r"item 'a': one row says nothing about the time between rows"),
        (lambda f: f.iloc[:0], "the frame has no rows"),
        (lambda f: f.to_numpy(), "expected a pandas data frame, got ndarray"),
    ],
)
def test_a_bad_frame_is_refused_with_the_item_and_the_place(pipeline, change, reason):
    with pytest.raises(ValueError, match=reason):
        pipeline.predict_df(broken(change), prediction_length=4)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"prediction_length": 0}, "horizon must be at least 1, got 0"),
        ({"prediction_length": 2.5}, "horizon must be a whole number, got 2.5"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"id_column": "itemid"}, "no column 'itemid'"),
        ({"quantile_levels": [0.99]}, "level 0.99 lies outside"),
    ],
)
def test_a_wrong_argument_of_a_frame_is_named(pipeline, wrong, reason):
    with pytest.raises(ValueError, match=reason):
        pipeline.predict_df(frame({"a": 40}), **{"prediction_length": 4, **wrong})


HOLED = np.concatenate([series(9), np.full(40, np.nan)])


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ([series(40), np.where(np.arange(9) == 3, np.inf, 1)], r"point 3 of series 1 is infinite"),
        (np.where(np.arange(90) == 3, -np.inf, 1), r"point 3 of series 0 is infinite"),  # before what is read
        ([[1e39, 2.0]], r"point 0 of series 0 is .* too large for float32 \(1e\+39\)"),
        ([series(40), np.full(9, np.nan)], r"series 1 has no observed value at any of its points"),
        (HOLED, r"series 0 has no observed value at any of its last 32 points"),
        ([series(9), []], r"series 1 must be \[points\] with at least one point, got shape \[0\]"),
        (np.zeros((2, 3, 4)), r"series 0 must be \[points\]"),
        (["a"], r"series 0 must hold numbers"),
        ([], "there is no series"),
    ],
)
def test_a_bad_series_is_refused_with_its_number_and_the_point(pipeline, given, reason):
    with pytest.raises(ValueError, match=reason):
        pipeline.predict_quantiles(given, 4, [0.5])


def test_series_that_are_odd_but_usable_are_forecast(pipeline):
    constant, short = np.full(40, 7.25), [1.0, 2.0]  # shorter than a patch, and a plain list
    np.testing.assert_array_equal(pipeline.predict_quantiles(constant, 5, [0.1, 0.9])[0], np.full((1, 5, 2), 7.25))
    found = pipeline.predict_quantiles(short, 5, [0.5])[0]
    assert found.shape == (1, 5, 1)
    assert found.isfinite().all()
    rows = frame({"a": 40}).assign(target=3.0)
    assert (pipeline.predict_df(rows, prediction_length=3)["0.9"] == 3).all()


def test_a_missing_value_is_allowed(pipeline):
    rows = frame({"a": 40})
    rows.loc[[3, 20], "target"] = np.nan
    assert pipeline.predict_df(rows, prediction_length=4)["predictions"].notna().all()


# looking back


def test_past_forecasts_know_nothing_of_their_future(pipeline):
    values = series(60)
    found = pipeline.historical_forecasts(values, 5, stride=10, start=30, last_points_only=False)
    assert [forecast.index[0] for forecast in found] == [30, 40, 50]
    np.testing.assert_array_equal(found[1].median, pipeline.predict(values[:40], 5).median)
    last = pipeline.historical_forecasts(values, 5, stride=10, start=0.5)
    np.testing.assert_array_equal(last, [[f.index[-1], f.median[-1]] for f in found])
    with pytest.raises(ValueError, match="no room for 5 points"):
        pipeline.historical_forecasts(values, 5, start=58)


def test_a_backtest_is_the_mean_over_past_forecasts(pipeline):
    def mae(predicted, actual):
        return np.abs(predicted - actual).mean()

    values = series(60)
    found = pipeline.historical_forecasts(values, 5, stride=7, start=40, last_points_only=False)
    want = np.mean([mae(f.median, values[f.index]) for f in found])
    assert pipeline.backtest(values, 5, metrics=[mae], stride=7, start=40) == {"mae": pytest.approx(want)}


def test_named_metrics_count_every_observed_point_once(pipeline):
    values = series(60)
    holed = np.where(np.arange(60) == 50, np.nan, values)
    found = pipeline.historical_forecasts(holed, 5, stride=5, start=40, last_points_only=False)
    error = np.concatenate([f.median - holed[f.index] for f in found])
    scores = pipeline.backtest(
        holed, 5, metrics=["mse", "mae", "mase", "wql", "coverage"], period=2, stride=5, start=40
    )
    assert scores["mse"] == pytest.approx(np.nanmean(error**2))
    assert scores["mase"] == pytest.approx(np.nanmean(np.abs(error)) / np.nanmean(np.abs(holed[2:] - holed[:-2])))
    inside = [(f.quantile(0.1) <= holed[f.index]) & (holed[f.index] <= f.quantile(0.9)) for f in found]
    assert scores["coverage"] == pytest.approx(np.mean(np.concatenate(inside)[~np.isnan(error)]))
    with pytest.raises(ValueError, match="no metric named 'mes'. Did you mean 'mse'"):
        pipeline.backtest(values, 5, metrics=["mes"], start=40)


def test_training_anew_for_every_past_forecast_leaves_the_model_alone(pipeline):
    values = series(80)
    before = pipeline.predict(values, 4).values
    options = {"stride": 20, "start": 60, "last_points_only": False}
    config = FitConfig(epochs=1, lr=1e-2)
    again = pipeline.historical_forecasts(values, 4, retrain=config, **options)
    plain = pipeline.historical_forecasts(values, 4, **options)
    assert [f.index[0] for f in again] == [f.index[0] for f in plain] == [60]
    assert not np.allclose(again[0].median, plain[0].median)
    np.testing.assert_array_equal(pipeline.predict(values, 4).values, before)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"stride": 0}, "stride must be at least 1"),
        ({"horizon": 0}, "horizon must be at least 1"),
        ({"start": 2.0}, "start 120 leaves no room"),
    ],
)
def test_a_wrong_argument_of_looking_back_is_named(pipeline, wrong, reason):
    with pytest.raises(ValueError, match=reason):
        pipeline.historical_forecasts(series(60), **{"horizon": 5, **wrong})


# gaps and oddities


def test_gaps_are_filled_and_the_rest_is_left_alone(pipeline):
    values = series(60)
    holed = values.copy()
    holed[20:27] = holed[59] = np.nan
    filled = pipeline.impute(holed)
    seen = ~np.isnan(holed)
    np.testing.assert_array_equal(filled[seen], values[seen])
    assert np.isfinite(filled).all()
    np.testing.assert_allclose(filled[59], pipeline.predict(filled[:59], 1).median[0], rtol=1e-5)
    with pytest.raises(ValueError, match="no observed value"):
        pipeline.impute(np.full(9, np.nan))


def trained(length=24 * 40):
    """A forecaster of a noisy sine of 24 points, and another stretch of it."""
    rng = np.random.default_rng(0)
    wave = np.sin(2 * np.pi * np.arange(length + 240) / 24) + 0.05 * rng.normal(size=length + 240)
    config = FitConfig(epochs=6, batch_size=32, lr=4e-3)
    sizes = {"patch_length": 8, "output_patches": 1, "context_length": 96}
    pipeline, fitted = ForecastPipeline.fit(wave[:length], "rimer-test", config=config, **sizes)
    return pipeline, fitted, wave[length:].astype(np.float32)


def test_a_fitted_forecaster_knows_the_season_and_finds_what_breaks_it(tmp_path):
    pipeline, fitted, wave = trained()
    assert fitted.validation[fitted.epoch - 1] == min(fitted.validation)
    error = np.abs(pipeline.predict(wave[:192], 48).median - wave[192:]).mean()
    assert error < 0.2 < np.abs(wave[:1] - wave[192:]).mean()
    wave[100:104] += 4
    score, odd = pipeline.detect_anomalies(wave, 0.95)
    assert score.shape == odd.shape == (240,)
    assert odd[96:104].all()
    pipeline.save(tmp_path / "sine")
    again = ForecastPipeline.from_pretrained(tmp_path / "sine")
    np.testing.assert_array_equal(again.predict(wave, 9).values, pipeline.predict(wave, 9).values)


@pytest.mark.parametrize(
    ("data", "options", "reason"),
    [
        (np.array([[1.0, 2.0], [3.0, np.inf]]), {}, "point 1 of channel 1 is infinite"),
        (np.full(90, np.nan), {}, "no observed value to learn from"),
        (["a"], {}, "fit takes numbers"),
        (np.zeros((2, 3, 4)), {}, r"got shape \[2, 3, 4\]"),
        (series(90), {"horizon": 0}, "horizon must be at least 1"),
        (series(90), {"validation_share": 1.0}, "validation_share must lie between 0 and 1"),
        (series(90), {"model": "rwkv7-test"}, "'rwkv7-test' is no forecaster"),
    ],
)
def test_fitting_names_what_it_cannot_use(data, options, reason):
    with pytest.raises(ValueError, match=reason):
        ForecastPipeline.fit(data, **{"model": "rimer-test", **options})


def test_other_uses_name_what_they_cannot_use(pipeline):
    endless = np.where(np.arange(60) == 30, np.inf, series(60))
    for use in (pipeline.impute, pipeline.detect_anomalies, pipeline.open_stream):
        with pytest.raises(ValueError, match="point 30 of the .* is infinite"):
            use(endless)
    with pytest.raises(ValueError, match="quantile must lie between 0 and 1"):
        pipeline.detect_anomalies(series(60), 2)
    with pytest.raises(ValueError, match="could not convert"):
        pipeline.open_stream(series(60)).push("a")


def test_fitting_refuses_what_it_cannot_learn_from(pipeline):
    with pytest.raises(ValueError, match="no window of 32 points"):
        ForecastPipeline.fit(series(30), "rimer-test")
    with pytest.raises(ValueError, match="unequal length"):
        ForecastPipeline.fit(frame({"a": 40, "b": 50}), "rimer-test", id_column="item_id")
    with pytest.raises(ValueError, match="fewer than two patches"):
        pipeline.detect_anomalies(series(7))
    with pytest.raises(ValueError, match="predicts nothing before the end"):
        ForecastPipeline(create_model("dlinear-test")).detect_anomalies(series(70))


def test_the_rate_rises_then_falls():
    rates = [one_cycle(step, 100, 0.1) for step in range(100)]
    assert rates.index(max(rates)) in (9, 10)
    assert rates[-1] < 0.01


def test_a_model_that_is_no_forecaster_is_refused(tmp_path):
    from rookery.models import save_model

    save_model(create_model("rwkv7-test"), tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="is a rwkv7 model, not a forecaster"):
        ForecastPipeline.from_pretrained(tmp_path / "m.safetensors")


# the result


def test_a_forecast_has_gluonts_manners():
    values = np.array([[1.0, 2.0, 3.0], [2.0, 3.0, 5.0]], np.float32)
    index = pd.date_range("2024-01-01", periods=2, freq="D")
    forecast = Forecast((0.1, 0.5, 0.9), values, index, np.arange(5.0), "x")
    np.testing.assert_array_equal(forecast.mean, [2, 3])
    np.testing.assert_allclose(forecast.quantile("0.7"), [2.5, 4])
    assert forecast.quantile_ts(0.9).index.equals(index)
    assert list(forecast.to_df().columns) == ["mean", "0.1", "0.5", "0.9"]


def test_a_plot_shows_history_intervals_and_median():
    from matplotlib.figure import Figure

    forecast = Forecast((0.1, 0.5, 0.9), np.ones((6, 3), np.float32), None, series(20), "OT")
    axes = forecast.plot(Figure().subplots())
    assert [line.get_label() for line in axes.get_lines()] == ["history", "forecast"]
    assert len(axes.collections) == 2
    assert axes.get_title() == "OT"
    assert axes.get_lines()[0].get_xdata()[-1] == -1


# streams


@pytest.mark.parametrize("name", ["rimer-test", "timer-test"])
def test_a_stream_that_is_fed_patches_forecasts_what_the_whole_series_does(name):
    model = randomised(name)
    whole = some_series(40)
    stream = ForecastPipeline(model).open_stream(whole[:40])
    np.testing.assert_allclose(stream.forecast(9), model.forecast(whole, 9)[0].numpy(), rtol=1e-6)


def test_one_value_at_a_time_equals_many():
    model, points = randomised("rimer-test"), some_series(61).numpy()
    one, many = (ForecastPipeline(model).open_stream(points[:20]) for _ in range(2))
    for value in points[20:]:
        one.push(value)
    many.push(points[20:])
    np.testing.assert_allclose(one.forecast(11), many.forecast(11), rtol=1e-6)


def test_a_forecast_from_within_a_patch_keeps_what_was_seen_of_it():
    model, points = randomised("rimer-test"), some_series(24).numpy()
    stream = ForecastPipeline(model).open_stream(points)
    ahead = stream.forecast(12)
    stream.push(points[:1])  # not what was predicted
    moved = stream.forecast(11)
    np.testing.assert_array_equal(moved[:3], ahead[1:4])  # the rest of the patch stands as predicted
    assert not np.allclose(moved[3:], ahead[4:])  # what follows it has heard of the value
    np.testing.assert_array_equal(stream.forecast(11), moved)  # asking changes nothing


def test_the_state_of_a_stream_does_not_grow():
    for name, grows in (("rimer-test", False), ("timer-test", True)):
        stream = ForecastPipeline(randomised(name)).open_stream(some_series(20).numpy())
        before = stream.state_bytes
        stream.push(some_series(400).numpy())
        assert (stream.state_bytes > before) == grows


def test_a_model_without_a_state_has_no_stream():
    with pytest.raises(ValueError, match="stream with rimer or timer"):
        ForecastPipeline(create_model("dlinear-test")).open_stream(series(40))
    with pytest.raises(ValueError, match="horizon must be at least 1"):
        ForecastPipeline(randomised("rimer-test")).open_stream(series(40)).forecast(0)
