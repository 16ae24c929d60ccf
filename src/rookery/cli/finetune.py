"""Train a model further, as a recipe says, or go on where the same command stopped.

  rookery finetune lora --set base=model.pth --set data.path=chats.jsonl

Recipes: lora, pissa, miss, full, state, dpo, orpo; `rookery recipes NAME` shows what can be set. Data are conversations
or texts in .jsonl, .json or .txt. Writes adapter/ and adapter.pth (or state.safetensors, or model.safetensors),
metrics.jsonl and checkpoints/ to the run's folder (`out`). Ctrl-C and SIGTERM save first.
"""

import argparse

from rookery.cli.train import add_arguments as add_arguments
from rookery.cli.train import run_recipe


def run(given: argparse.Namespace) -> int:
    return run_recipe(given, default="lora")
