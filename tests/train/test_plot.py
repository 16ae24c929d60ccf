"""Pictures of runs: it is true that …"""

import json
import math
import sys

import numpy as np
import pytest

from rookery.cli.main import main
from rookery.errors import MissingDependency
from rookery.train.plot import plot, read_metrics, smoothed


@pytest.fixture
def runs(tmp_path):
    folders = [tmp_path / "small" / "run", tmp_path / "large" / "run"]
    for folder in folders:
        folder.mkdir(parents=True)
        rows = []
        for step in range(1, 201):
            row = {"step": step, "tokens": 512 * step, "loss": 5 / step**0.1, "lr": 1e-3, "grad_norm": 2.0}
            row["tokens_per_second"] = 1000.0
            if step % 50 == 0:
                row["validation_loss"] = row["loss"] + 0.1
            if step == 7:
                row |= {"loss": None, "skipped": True}
            rows.append(row)
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 201, "lo')
    return folders


def test_metrics_are_columns_with_gaps(runs):
    found = read_metrics(runs[0])
    assert len(found["loss"]) == 200  # the line that is not whole is left out
    assert math.isnan(found["loss"][6])
    assert np.isfinite(found["validation_loss"]).sum() == 4


def test_a_picture_is_written(runs, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out = tmp_path / "curves.png"
    assert main(["plot", *map(str, runs), "--out", str(out), "--by", "tokens"]) == 0
    assert out.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert capsys.readouterr().out.strip() == str(out)


def test_smoothing_is_a_running_mean_without_the_gaps():
    values = np.array([1.0, math.nan, 3.0, 5.0])
    assert smoothed(values, 2).tolist() == [1.0, 1.0, 3.0, 4.0]


def test_a_folder_without_a_run_and_an_empty_run_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="give the folder of a run"):
        plot([tmp_path], tmp_path / "x.png")
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(ValueError, match="no steps yet"):
        read_metrics(tmp_path)


def test_missing_matplotlib_is_named(monkeypatch, runs, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependency, match=r"rookery\[train\]"):
        plot(runs, tmp_path / "x.png")
