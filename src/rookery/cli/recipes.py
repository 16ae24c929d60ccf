"""List the named training runs, with what each is for."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help="show all settings of this one")


def run(given: argparse.Namespace) -> int:
    from rookery.recipes import RECIPES, recipe
    from rookery.train.config import describe

    if given.name:
        print(describe(recipe(given.name)))
        return 0
    width = max(map(len, RECIPES))
    for name, make in RECIPES.items():
        print(f"{name:<{width}}  {make.__doc__}")
    return 0
