import numpy as np
import pytest
from support.data import shared

from rookery.evaluate.m4 import evaluate_m4


@pytest.mark.data
def test_the_seasonal_naive_scores_as_published():
    files = (shared("timeseries/M4_Hourly-train.csv"), shared("timeseries/M4_Hourly-test.csv"))
    found = evaluate_m4("seasonal-naive", *files)
    assert found["series"] == 414
    assert found["smape"] == pytest.approx(13.912, abs=6e-4)
    assert found["mase"] == pytest.approx(1.193, abs=6e-4)


@pytest.fixture
def files(tmp_path):
    wave = 5 + np.sin(2 * np.pi * np.arange(148) / 24)
    (tmp_path / "train.csv").write_text("V1\na," + ",".join(map(str, wave[:100])) + ",,\n")
    (tmp_path / "test.csv").write_text("V1\na," + ",".join(map(str, wave[100:])) + "\n")
    return tmp_path


def test_a_perfect_forecast_has_no_error(files):
    assert evaluate_m4("seasonal-naive", files / "train.csv", files / "test.csv")["smape"] < 1e-4


def test_files_that_do_not_belong_together_are_refused(files):
    (files / "other.csv").write_text("V1\nb,1,2\n")
    with pytest.raises(ValueError, match="'a' is in one of the two files only"):
        evaluate_m4("persistence", files / "train.csv", files / "other.csv")
    (files / "bad.csv").write_text("V1\na,1,x\n")
    with pytest.raises(ValueError, match=r"line 2 \(a\): a value is no number"):
        evaluate_m4("persistence", files / "bad.csv", files / "test.csv")
    (files / "empty.csv").write_text("V1\n")
    with pytest.raises(ValueError, match="no series"):
        evaluate_m4("persistence", files / "empty.csv", files / "test.csv")
