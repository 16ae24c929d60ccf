"""Turn a transformer into an RWKV, or go on where the same command stopped.

  rookery distill radlads --set teacher=Qwen2.5-0.5B --set data.path=text.jsonl --set out=out/mine

Ways: radlads (stages align, distill, text), radlads-2a, radlads-3a, arwkv (align, distill; sft and dpo where they are
given data). A setting may be for one stage: --set distill.steps=500. Each stage writes model.safetensors,
metrics.jsonl, checkpoints/ and (with held-out text) verification.txt to a folder of its own; finished ones are not run
again. A stage alone is a recipe: radlads-align.
"""

import argparse
import sys
from pathlib import Path

from rookery.cli.train import add_arguments as add_train_arguments
from rookery.cli.train import before_torch, processes, run_recipe, trained


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_train_arguments(parser)
    parser.add_argument("--stages", default="", metavar="A,B", help="run these stages alone")


def run(given: argparse.Namespace) -> int:
    before_torch()
    from rookery.recipes.distill import OWN_DATA, STAGES
    from rookery.train.config import describe, merged, parse_settings, read_toml

    name, values = given.recipe, {}
    if name.endswith(".toml"):
        values = read_toml(Path(name))
        name = values.pop("recipe", "radlads")
    if name not in STAGES:
        return run_recipe(given, default="radlads-align")
    from rookery.train.stages import is_finished, staged

    chosen = [stage for stage in given.stages.split(",") if stage]
    stages = staged(STAGES[name], merged(values, parse_settings(given.set)), chosen=chosen, own_data=OWN_DATA)
    if given.dry_run:
        for stage, config in stages:
            print(f"[{stage}]\n{describe(config)}\n")
        return 0
    with processes():
        from rookery.train.parallel import Place

        for stage, config in stages:
            done = is_finished(config)
            if Place.here().first:
                print(f"{stage}: finished, see {config.out}" if done else f"{stage}: {config.out}", file=sys.stderr)
            if not done and (code := trained(config)):
                return code
    return 0
