"""List the models that `create_model` makes by name: families, and their published sizes."""

import argparse
import json
from math import prod
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pattern", nargs="?", default="*", help="shell pattern that names must match, as '*-test'")
    parser.add_argument("--json", action="store_true", help="one JSON list")


def run(args: argparse.Namespace) -> int:
    from rookery.registry import list_models

    rows = [row(name) for name in list_models(args.pattern)]
    if args.json:
        print(json.dumps(rows, indent=2))
        return 0
    if not rows:
        raise ValueError(f"no model's name matches {args.pattern!r}; `rookery models` lists all {len(list_models())}")
    width = max(len(row["name"]) for row in rows)
    print(f"{'name':<{width}}  {'kind':<9} {'parameters':>10} {'layers':>6} {'width':>6} {'vocabulary':>10}")
    for r in rows:
        sizes = [r["config"].get(key) for key in ("num_hidden_layers", "hidden_size", "vocab_size")]
        layers, channels, vocabulary = ("" if size is None else size for size in sizes)
        count = short(r["parameters"])
        print(f"{r['name']:<{width}}  {r['kind']:<9} {count:>10} {layers:>6} {channels:>6} {vocabulary:>10}")
    return 0


def row(name: str) -> dict[str, Any]:
    """What is known of a registered name without building the model. A bare family has its default sizes."""
    from dataclasses import asdict

    from rookery.registry import configure

    family, config = configure(name)
    parameters = sum(prod(shape) for shape in family.tensor_shapes(config).values())
    return {
        "name": name,
        "family": family.name,
        "kind": family.kind,
        "parameters": parameters,
        "config": asdict(config),
    }


def short(count: int) -> str:
    """1234567 -> '1.2M'."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if count >= size:
            return f"{count / size:.1f}{unit}"
    return str(count)
