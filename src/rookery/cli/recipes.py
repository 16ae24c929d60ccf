"""List the named training runs, with what each is for."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help="show all settings of this one")


def run(given: argparse.Namespace) -> int:
    from rookery.recipes import RECIPES, recipe
    from rookery.recipes.distill import STAGES
    from rookery.train.config import describe

    if given.name:
        print(describe(recipe(given.name)))
        return 0
    width = max(map(len, RECIPES))
    for name, make in RECIPES.items():
        print(f"{name:<{width}}  {make.__doc__}")
    for name, stages in STAGES.items():
        print(f"{name:<{width}}  For `rookery distill`, one after the other: {', '.join(stages)}.")
    return 0
