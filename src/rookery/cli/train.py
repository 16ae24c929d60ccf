"""Train a model as a recipe says, or go on where the same command stopped.

Writes metrics.jsonl, checkpoints/ and at the end model.safetensors to the run's folder (`out`). Ctrl-C and SIGTERM save
first; `rookery recipes` lists what can be run.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="name of a recipe, or a TOML file whose first key may be `recipe = NAME`")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting: optim.lr=1e-3"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the resolved run and its size, then stop")


SPIN = "5000"
"""Turns that a thread of OpenMP, which torch runs on, waits awake for its next work: some 50 µs. Left alone it stays
awake for milliseconds and takes the core from the threads of our kernels, which run next, or from another program."""


def before_torch() -> None:
    """Lets OpenMP's threads sleep early, unless the user has said how long they shall wait."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN)  # read when torch is first imported


def run(given: argparse.Namespace) -> int:
    return run_recipe(given, default="tiny-test")


def estimate(config: Any) -> None:
    """Prints what the run will take, or on stderr why that cannot be told."""
    from rookery.train.plan import plan

    try:
        print(f"\n{plan(config).lines()}")
    except (ValueError, OSError) as reason:
        print(f"no estimate: {reason}", file=sys.stderr)


def run_recipe(given: argparse.Namespace, default: str) -> int:
    """Trains as the command line says; `default` is the recipe of a TOML file that names none."""
    before_torch()
    from rookery.recipes import recipe
    from rookery.train.config import describe, overlay, parse_settings, read_toml

    values = {}
    name = given.recipe
    if name.endswith(".toml"):
        values = read_toml(Path(name))
        name = values.pop("recipe", default)
    config = overlay(overlay(recipe(name), values), parse_settings(given.set))
    if given.dry_run:
        print(describe(config))
        estimate(config)
        return 0
    with processes():
        return trained(config)


@contextmanager
def processes() -> Iterator[None]:
    """The processes that torchrun has started, for the time of the block; nothing where this is the only one."""
    from rookery.train.memory import keep_freed_memory

    keep_freed_memory()
    many = "LOCAL_RANK" in os.environ
    if many:
        from rookery.train.parallel import start, stop

        start(int(os.environ["LOCAL_RANK"]))
    yield
    if many:  # not where the block failed: the others may wait for this one elsewhere
        stop()


def trained(config: Any) -> int:
    """Trains, and gives the exit code; what the run writes is there for all processes then."""
    from rookery.train.loop import train
    from rookery.train.parallel import wait

    result = train(config)
    wait()
    if result.signal is not None:
        print(f"stopped at step {result.step}; the same command continues", file=sys.stderr)
        return 128 + result.signal
    return 0
