import csv

import numpy as np
import pytest
import torch
from support.series import randomised

from rookery.models import save_model


@pytest.fixture
def files(tmp_path):
    """A CSV file of three days of hours, and a forecaster."""
    save_model(randomised("rimer-test", dtype=torch.float32), tmp_path / "m.safetensors")
    times = np.datetime64("2024-02-28", "s") + np.arange(72) * np.timedelta64(3600, "s")
    lines = [f"{t},{i % 24},{i}" for i, t in enumerate(times)]
    (tmp_path / "data.csv").write_text("date,load,OT\n" + "\n".join(lines))
    return tmp_path


def test_a_column_is_forecast_into_a_file_and_a_picture(cli, files):
    out, picture = files / "f.csv", files / "f.png"
    code, said, _ = cli(
        "forecast", files / "data.csv", "--target", "load", "--horizon", "30", "--model", files / "m.safetensors",
        "-o", out, "--plot", picture,
    )  # fmt: skip
    assert (code, said) == (0, "")
    rows = list(csv.DictReader(out.read_text().splitlines()))
    assert list(rows[0]) == ["time", "load", "0.1", "0.5", "0.9"]
    assert len(rows) == 30
    assert rows[0]["time"] == "2024-03-02 00:00:00"
    assert all(float(row["0.1"]) <= float(row["load"]) <= float(row["0.9"]) for row in rows)
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_the_last_column_is_forecast_to_the_standard_output(cli, files):
    code, said, _ = cli(
        "forecast", files / "data.csv", "--horizon", "3", "--model", files / "m.safetensors", "--levels", ""
    )
    assert code == 0
    assert said.splitlines()[0] == "time,OT"
    assert len(said.splitlines()) == 4


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--target", "price"], "no column 'price'; the columns are load, OT"),
        (["--horizon", "0"], "horizon must be at least 1"),
        (["--levels", "0.99"], "level 0.99 lies outside"),
        (["--levels", "0.5,high"], "--levels takes numbers between 0 and 1 such as 0.1,0.5,0.9; got 'high'"),
        (["--plot", "nowhere/f.png"], "there is no folder 'nowhere'"),
        (["--plot", "f.xyz"], "Format 'xyz' is not supported"),
    ],
)
def test_a_wrong_argument_is_one_line_and_no_file(cli, files, options, reason, monkeypatch):
    monkeypatch.chdir(files)
    out = files / "f.csv"
    code, _, err = cli("forecast", files / "data.csv", "--model", files / "m.safetensors", "-o", out, *options)
    assert code == 1
    assert reason in err
    assert len(err.splitlines()) == 1
    assert sorted(path.name for path in files.iterdir()) == ["data.csv", "m.safetensors"]


def without_value(line):
    return line.rsplit(",", 1)[0] + ","


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda lines: lines[:30] + lines[31:], "row 30 after the header is of 2024-02-29 06:00:00 where"),
        (lambda lines: lines[:41] + lines[41::2], "row 42 after the header is of 2024-02-29 18:00:00 where"),
        (lambda lines: lines[:31] + lines[30:], "line 32: 2024-02-29T05:00:00 is not later than the row before"),
        (lambda lines: lines[:2], "one row says nothing about the time between rows"),
        (lambda lines: [lines[0], *map(without_value, lines[1:])], "'OT' has no observed value at any of its"),
        (lambda lines: [*lines[:9], without_value(lines[9]) + "inf", *lines[10:]], "line 10, column 'OT': the value"),
        (lambda lines: [line.rsplit(",", 2)[0] for line in lines], "a column of times and none of values"),
    ],
)  # fmt: skip
def test_a_bad_file_is_one_line_and_no_file(cli, files, change, reason):
    lines = (files / "data.csv").read_text().splitlines()
    (files / "data.csv").write_text("\n".join(change(lines)))
    code, said, err = cli("forecast", files / "data.csv", "--model", files / "m.safetensors", "-o", files / "f.csv")
    assert (code, said) == (1, "")
    assert reason in err
    assert not (files / "f.csv").exists()
