"""Named training runs: functions that return a TrainConfig. `RECIPES` is what `rookery train NAME` knows."""

from collections.abc import Callable

from rookery.errors import unknown
from rookery.recipes.embedded import embedded
from rookery.recipes.tiny_test import tiny_test
from rookery.train.config import TrainConfig

RECIPES: dict[str, Callable[[], TrainConfig]] = {"embedded": embedded, "tiny-test": tiny_test}


def recipe(name: str) -> TrainConfig:
    """The run of that name."""
    if name not in RECIPES:
        raise unknown("recipe", name, RECIPES, "`rookery train --help`")
    return RECIPES[name]()
