"""Configurations overlay strictly."""

from dataclasses import asdict
from pathlib import Path

import pytest

from rookery.errors import UnknownName
from rookery.recipes import RECIPES, recipe
from rookery.train.config import TrainConfig, describe, overlay, parse_settings, read_toml


def test_settings_reach_nested_fields():
    config = overlay(
        TrainConfig(), parse_settings(["optim.lr=1e-3", "data.path=a.txt", "steps=7", "overrides.head_dim=8"])
    )
    assert (config.optim.lr, config.data.path, config.steps, config.overrides) == (1e-3, "a.txt", 7, {"head_dim": 8})


def test_an_unknown_setting_names_its_place_and_the_nearest_known_one():
    with pytest.raises(UnknownName, match=r"optim\.lrr.*Did you mean 'optim\.lr'"):
        overlay(TrainConfig(), {"optim": {"lrr": 1.0}})


@pytest.mark.parametrize("setting", ["steps=many", "optim.lr=true", "data.path=3", "data=3"])
def test_a_value_of_the_wrong_type_is_refused(setting):
    with pytest.raises(UnknownName, match="got"):
        overlay(TrainConfig(), parse_settings([setting]))


@pytest.mark.parametrize("setting", ["steps", "=3"])
def test_a_setting_without_key_or_value_is_refused(setting):
    with pytest.raises(ValueError, match="key=value"):
        parse_settings([setting])


def test_whole_numbers_serve_where_fractions_are_asked_for():
    assert overlay(TrainConfig(), {"optim": {"lr": 1}}).optim.lr == 1.0


@pytest.mark.parametrize("setting", ["steps=0", "batch_size=0", "data.validation_share=1.0"])
def test_impossible_numbers_are_refused(setting):
    with pytest.raises(ValueError, match="must"):
        overlay(TrainConfig(), parse_settings([setting]))


def test_toml_overlays(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('steps = 3\n[optim]\nschedule = "wsd"\n')
    config = overlay(TrainConfig(), read_toml(path))
    assert (config.steps, config.optim.schedule) == (3, "wsd")


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_describes_itself_completely(name):
    config = recipe(name)
    text = describe(config)
    assert all(f"{key} = " in text or f"{key}." in text for key in asdict(config))


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(UnknownName, match="Did you mean 'tiny-test'"):
        recipe("tiny-tset")


def test_every_setting_is_documented():
    page = (Path(__file__).parents[2] / "docs/reference/training.md").read_text("utf-8")
    names = [line.split(" = ")[0] for line in describe(TrainConfig()).splitlines()]
    assert not [name for name in names if f"| `{name}` | " not in page]


def test_a_word_that_is_no_choice_is_refused_with_the_choices():
    with pytest.raises(ValueError, match="order must be one of shuffle, official, documents; got 'random'"):
        overlay(TrainConfig(), {"data": {"order": "random"}})
