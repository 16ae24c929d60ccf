"""Where metrics go: it is true that …"""

import json
import math
import sys
from types import SimpleNamespace

import pytest

from rookery.errors import MissingDependency
from rookery.train.track import Metrics, sink


def test_a_value_that_is_not_finite_is_null(tmp_path):
    metrics = Metrics(tmp_path / "metrics.jsonl", 0)
    metrics.write(step=1, loss=math.nan)
    metrics.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": None}


def test_tensorboard_gets_every_value(tmp_path):
    pytest.importorskip("tensorboard")
    metrics = Metrics(tmp_path / "metrics.jsonl", 0, "tensorboard")
    metrics.write(step=1, loss=2.0, lr=0.1)
    metrics.close()
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_trackers_get_every_value(tmp_path, monkeypatch):
    logged = []
    module = SimpleNamespace(
        init=lambda **given: logged.append(given),
        log=lambda values, step: logged.append((step, values)),
        finish=lambda: logged.append("finished"),
    )
    monkeypatch.setitem(sys.modules, "trackio", module)
    metrics = Metrics(tmp_path / "metrics.jsonl", 0, "trackio")
    metrics.write(step=3, loss=2.0)
    metrics.close()
    assert logged == [{"project": "rookery", "name": tmp_path.name}, (3, {"loss": 2.0}), "finished"]


def test_an_unknown_or_missing_tracker_is_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="track knows tensorboard, trackio, wandb"):
        sink("paper", tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingDependency, match="pip install wandb"):
        sink("wandb", tmp_path)
