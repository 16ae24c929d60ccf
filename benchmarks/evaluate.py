"""What it saves to read once what questions share: benchmarks with and without, interleaved.

    python benchmarks/evaluate.py DATA [--model FILE] [--rounds 5] [--save]

DATA is a folder with requests of the OLMo project (`arc_easy.rc_5shot.jsonl.gz`, …). Without --model it is the embedded
one. Both ways give the same accuracies.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from support import Machine, interleaved, report

from rookery.evaluate.benchmarks import multiple_choice
from rookery.evaluate.needle import passkey
from rookery.evaluate.run import load_for_evaluation
from rookery.evaluate.scoring import Scorer

TASKS = {"arc_easy.rc_0shot": 40, "arc_easy.rc_5shot": 20, "hellaswag.rc_5shot": 12}
"""Files of requests, and how many questions of each."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--model")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    model, tokenizer = load_for_evaluation(given.model)
    tasks: dict[str, Callable[[Scorer], dict[str, Any]]] = {
        name: lambda scorer, name=name, limit=limit: multiple_choice(
            scorer, tokenizer, given.data / f"{name}.jsonl.gz", limit
        )
        for name, limit in TASKS.items()
    }
    tasks["needle"] = lambda scorer: passkey(scorer, tokenizer, lengths=(1024,), trials=3)
    rows = []
    for name, task in tasks.items():
        shared = Scorer(model)
        found, plain = task(shared), task(Scorer(model, reuse=False))
        assert found == plain, f"{name}: {found} with sharing, {plain} without"
        calls = {
            "shared": lambda task=task: task(Scorer(model)),
            "plain": lambda task=task: task(Scorer(model, reuse=False)),
        }
        seconds = interleaved(calls, rounds=given.rounds)
        low, high = seconds.spread("plain", "shared")
        rows.append(
            {
                "task": name,
                "questions": found["questions"],
                "tokens asked": shared.tokens_asked,
                "tokens read": shared.tokens_read,
                "seconds": seconds.median("shared"),
                "ratio": seconds.ratio("plain", "shared"),
                "from": low,
                "to": high,
            }
        )
    report("evaluate", rows, Machine(threads=given.threads), save=given.save)


if __name__ == "__main__":
    main()
