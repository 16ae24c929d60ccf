"""Recipes: it is true that …"""

import json
from pathlib import Path

import pytest

from rookery.recipes import recipe
from rookery.registry import families
from rookery.train.config import overlay
from rookery.train.loop import train


@pytest.mark.parametrize("name", [name for name, family in families().items() if family.kind == "language"])
def test_the_tiny_recipe_trains_a_language_model_of_any_family(name, tmp_path):
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog.\n" * 20)
    data = {"path": str(tmp_path / "text.txt"), "sequence_length": 32, "validation_share": 0}
    settings = {"model": name, "data": data, "batch_size": 2, "steps": 3, "out": str(tmp_path / "run"), "device": "cpu"}
    train(overlay(recipe("tiny-test"), settings))
    rows = [json.loads(line) for line in (Path(tmp_path) / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert (tmp_path / "run" / "model.safetensors").is_file()
