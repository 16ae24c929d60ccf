from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from rookery.data.series import (
    Scaler,
    SeriesWindows,
    Splits,
    Table,
    assert_no_overlap,
    future_times,
    period_of,
    read_table,
    standard_splits,
)


def written(tmp_path, text):
    path = tmp_path / "series.csv"
    path.write_text(text)
    return path


def test_a_first_column_of_dates_is_the_time(tmp_path):
    table = read_table(written(tmp_path, "date,a,b\n2020-01-01 00:00:00,1,2\n2020-01-01 01:00:00,,nan\n"))
    assert table.names == ("a", "b")
    assert table.step == 3600
    np.testing.assert_array_equal(table.values, [[1, 2], [np.nan, np.nan]])
    np.testing.assert_array_equal(table.column("b"), [2, np.nan])


def test_a_first_column_of_numbers_is_a_channel(tmp_path):
    table = read_table(written(tmp_path, "0,1\n0.7855,-1.5\n0.7818,2e-3\n"))
    assert table.names == ("0", "1")
    assert table.times is None
    assert table.step is None
    np.testing.assert_array_equal(table.values, [[0.7855, -1.5], [0.7818, 0.002]])


@pytest.mark.parametrize(("seconds", "period"), [(600, 144), (900, 96), (3600, 24), (7200, 12), (7000, 1), (None, 1)])
def test_rows_that_divide_a_day_have_its_season(seconds, period):
    assert period_of(seconds) == period


@pytest.mark.parametrize(
    ("text", "period"),
    [("1949-01,1\n1949-02,2\n1949-03,3\n", 12), ("2022-01-02,1\n2022-01-09,2\n", 52), ("2020/1/1,1\n2020/1/2,2\n", 7)],
)
def test_months_weeks_and_days_have_their_season(tmp_path, text, period):
    assert period_of(read_table(written(tmp_path, "when,x\n" + text)).step) == period


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("date,a\n2020-01-01,x\n", r"line 2, column 'a': 'x' is no number"),
        ("date,a\n2020-01-01,1\n2020-01-02,inf\n", r"line 3, column 'a': the value is infinite"),
        ("date,a\n2020-01-01,1\n2020-01-01,2\n", r"line 3: 2020-01-01 is not later"),
        ("date,a\n2020-01-01,1\nyesterday,2\n", r"line 3: 'yesterday' is no date"),
        ("date,a\n2020-01-01,1,2\n", r"line 2: 3 values under 2 column names"),
        ("date,a\n", "at least one row"),
        ("", "expected a header"),
    ],
)
def test_a_bad_file_is_refused_with_its_line(tmp_path, text, reason):
    with pytest.raises(ValueError, match=reason):
        read_table(written(tmp_path, text))


@pytest.mark.parametrize("freq", ["h", "15min", "D", "B", "W", "4W", "MS", "ME", "2MS", "QS", "QE", "YS", "YE", "30s"])
def test_times_go_on_in_their_step_and_a_gap_is_named(freq):
    every = pd.date_range("2023-01-02", periods=70, freq=freq).to_numpy().astype("datetime64[s]")
    table = Table(("x",), np.zeros((60, 1)), every[:60])
    np.testing.assert_array_equal(future_times(table, 10), every[60:])
    holed = replace(table, times=np.delete(every[:60], 20))
    when = str(every[20]).replace("T", " ")
    with pytest.raises(ValueError, match=f"row 21 after the header is of .* where {when} should follow"):
        future_times(holed, 10)


def test_rows_without_dates_go_on_by_number():
    np.testing.assert_array_equal(future_times(Table(("x",), np.zeros((3, 1))), 2), [3, 4])


def test_a_missing_file_and_column_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_table(tmp_path / "nowhere.csv")
    with pytest.raises(ValueError, match="no column 'OT'; the columns are a"):
        read_table(written(tmp_path, "a\n1\n")).column("OT")


def made(rows, step):
    times = np.datetime64("2016-07-01", "s") + np.arange(rows) * np.timedelta64(step, "s")
    return Table(("x",), np.zeros((rows, 1)), times)


@pytest.mark.parametrize(
    ("rows", "step", "borders"),
    [
        (17420, 3600, (8640, 11520, 14400)),  # ETTh
        (69680, 900, (34560, 46080, 57600)),  # ETTm
        (52696, 600, (36887, 42157, 52696)),  # Weather
        (26304, 3600, (18412, 21044, 26304)),  # electricity
        (966, 604800, (676, 773, 966)),  # ILI
    ],
)
def test_published_sets_have_their_published_borders(rows, step, borders):
    splits = standard_splits(made(rows, step))
    assert (splits.train.stop, splits.validation.stop, splits.test.stop) == borders


def test_windows_look_back_across_a_border_but_never_predict_across_it():
    values = np.arange(100.0)[:, None] * [1, 10]
    windows = SeriesWindows(values, range(60, 80), 30, 5)
    assert len(windows) == 16
    everything = np.concatenate(list(windows.batches(7)))
    assert everything.shape == (32, 35)
    np.testing.assert_array_equal(everything[0], np.arange(30, 65))  # channel after channel
    np.testing.assert_array_equal(everything[1], 10 * np.arange(30, 65))
    assert everything[-2, -1] == 79


def test_windows_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="no window of 30 points of history and 10 to predict"):
        SeriesWindows(np.zeros((39, 1)), range(39), 30, 10)


def test_scaling_knows_the_training_rows_only():
    values = np.array([[1.0, 5.0], [3.0, 5.0], [np.nan, 5.0]])
    scaler = Scaler.of(values)
    np.testing.assert_array_equal(scaler.mean, [2, 5])
    np.testing.assert_array_equal(scaler.deviation, [1, 1])  # a channel that never varies is left as it is
    np.testing.assert_array_equal(scaler.into(values)[:2, 0], [-1, 1])


def walk(rows):
    return np.random.default_rng(0).normal(size=(rows, 3)).cumsum(axis=0)


def test_honest_windows_pass_the_leak_detector():
    splits = Splits(range(300), range(300, 400), range(400, 500))
    noise = np.random.default_rng(0).normal(size=(500, 3))
    assert_no_overlap(SeriesWindows(noise, splits.train, 64, 32), splits)


def test_targets_that_lie_in_the_input_are_found():
    # the released Rimer predicts its input shifted by one row (timeseries.md 6.1)
    class Shifted(SeriesWindows):
        def take(self, numbers):
            window = super().take(numbers)[:, : self.context]
            return np.concatenate([window, window[:, 1:], super().take(numbers)[:, self.context : self.context + 1]], 1)

    splits = Splits(range(300), range(300, 400), range(400, 500))
    with pytest.raises(ValueError, match="lies in the input"):
        assert_no_overlap(Shifted(np.random.default_rng(0).normal(size=(500, 3)), splits.train, 32, 32), splits)


def test_splits_that_run_backwards_are_found():
    splits = Splits(range(200, 500), range(100, 200), range(100))
    with pytest.raises(ValueError, match="backwards in time"):
        assert_no_overlap(SeriesWindows(walk(500), splits.train, 32, 8), splits)
