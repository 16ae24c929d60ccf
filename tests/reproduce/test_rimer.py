"""Sets of `rookery reproduce rimer --full` that are read or scored in a way of their own: it is true that …"""

import numpy as np
import pytest

from rookery.forecasting.fit import FitConfig
from rookery.reproduce import rimer
from rookery.reproduce.base import Work


@pytest.fixture
def full(tmp_path, monkeypatch):
    """Work at full scale, but for the number of passes."""
    monkeypatch.setattr(rimer, "FitConfig", lambda **given: FitConfig(**{**given, "epochs": 1}))
    return Work(scale="full", folder=tmp_path)


def series(name, hours):
    """A row of M4: one series that starts where it may, two days long in the file of what is to come."""
    wave = 5 + np.sin(2 * np.pi * hours / 24) + 0.01 * np.cos(hours**2)
    return f"{name}," + ",".join(f"{value:.3f}" for value in wave)


def test_series_of_unequal_length_are_trained_on_together_and_scored_as_m4_does(full, tmp_path):
    known = [series("H1", np.arange(40, 170)), series("H2", np.arange(170))]
    (tmp_path / "train.csv").write_text("V1\n" + "\n".join(known))
    (tmp_path / "test.csv").write_text("V1\n" + "\n".join(series(n, np.arange(170, 218)) for n in ("H1", "H2")))
    m4 = rimer.M4Set(
        name="M4", path=tmp_path / "train.csv", test=tmp_path / "test.csv", horizons=(48,), lookback=48, patch=24
    )
    train, validation = m4.windows(48)
    assert len(validation) == 1
    assert len(train) == 170 - 48 - 48 - 48 + 1
    assert len(train.take(np.arange(len(train)))) == 2 * len(train)
    table = rimer.rows(full, m4, 48)
    assert [row["mse"] for row in table] == [None] * 6
    naive = next(row for row in table if row["model"] == "seasonal-naive")
    assert naive["smape"] < 0.5  # percent
    assert all(np.isfinite(row["mase"]) for row in table)
    assert len({tuple(row) for row in table}) == 1


def test_channels_that_begin_late_are_trained_on_from_where_they_begin(full, tmp_path):
    weeks = np.datetime64("2000-01-02") + 7 * np.arange(400)
    rows = [f"{week},{np.sin(i / 8):.3f},{'' if i < 150 else i % 9}" for i, week in enumerate(weeks)]
    (tmp_path / "ili.csv").write_text("DATE,a,b\n" + "\n".join(rows))
    ili = rimer.SeriesSet(name="ILI", path=tmp_path / "ili.csv", horizons=(24,), lookback=52, patch=13)
    train, _ = ili.windows(24)
    assert len(train) < len(train.take(np.arange(len(train)))) < 2 * len(train)
    table = rimer.rows(full, ili, 24)
    assert all(np.isfinite(row["mse"]) and np.isfinite(row["mase"]) for row in table)
    assert all(row["smape"] is None for row in table)
