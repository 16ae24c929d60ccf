import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.training import assert_resumes_exactly

from rookery.forecasting.pipeline import ForecastPipeline
from rookery.recipes import recipe
from rookery.train.config import overlay
from rookery.train.loop import train
from rookery.train.tasks.forecast import ForecastTask


@pytest.fixture
def config(tmp_path):
    """Ten steps on a sine of 24 rows."""
    wave = np.sin(2 * np.pi * np.arange(400) / 24)
    (tmp_path / "data.csv").write_text("a,b\n" + "\n".join(f"{x},{-x}" for x in wave))
    small = {
        "model": "rimer-test",
        "overrides": {"dropout": 0.2},
        "data": {"path": str(tmp_path / "data.csv")},
        "optim": {"warmup_steps": 2, "lr": 4e-3},
        "out": str(tmp_path / "run"),
        "steps": 10,
        "batch_size": 8,
        "save_every": 4,
        "validate_every": 10,
    }
    return overlay(recipe("forecast"), small)


def metrics(config):
    return [json.loads(line) for line in Path(config.out, "metrics.jsonl").read_text().splitlines()]


def test_a_recipe_trains_a_forecaster_that_can_be_used(config):
    train(config)
    rows = metrics(config)
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert rows[-1]["validation_loss"] > 0
    assert rows[0]["tokens"] == 8 * 2 * 8  # windows, channels, patches of a context of 32
    found = ForecastPipeline.from_pretrained(config.out).predict(np.ones(40), 5)
    assert found.values.shape == (5, 3)


def test_a_resumed_run_is_exact_with_dropout(config, tmp_path):
    train(config)
    half = overlay(config, {"out": str(tmp_path / "half"), "steps": 10})
    assert_resumes_exactly(config, half, ForecastTask, step=6)


def test_every_window_comes_once_in_a_pass(config):
    task = ForecastTask(config)
    count = len(task.windows)
    assert sorted(task.order.item(place) for place in range(count)) == list(range(count))
    assert [task.order.item(place) for place in range(count, 2 * count)] != [task.order.item(p) for p in range(count)]


def test_a_model_or_data_that_do_not_fit_are_refused(config):
    with pytest.raises(ValueError, match="no series to train on"):
        ForecastTask(overlay(config, {"data": {"path": ""}}))
    plain = replace(config, model="rwkv7-test", overrides={})
    with pytest.raises(ValueError, match="'rwkv7-test' is no forecaster"):
        ForecastTask(plain)
