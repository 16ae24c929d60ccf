"""Does rounding add up? Logits and state after a very long text, against float64.

    python benchmarks/drift.py [--model FILE] [--tokens 1000000] [--save]

The compiled runtime and torch read the same text with float32 weights, torch once more in float64; the text is made of
pieces that the model wrote itself. Errors are the largest one over the largest number, of the logits after the last
token and of the recurrent state (the worst layer), at 1,000, 10,000, … tokens. A million tokens of the embedded model
take 12 minutes of one core, nearly all of it in float64. Without --model it is the embedded one.
"""

import argparse
import sys
from typing import Any

import numpy as np
import torch
from snapshots import texts_of
from support import Machine, report

from rookery import LLM
from rookery.engine.llm import model_path
from rookery.engine.runners.native import NativeRunner
from rookery.engine.runners.torch import TorchRunner
from rookery.models import load

PIECE = 500
"""Tokens of a call."""


def apart(found: np.ndarray, exact: np.ndarray) -> float:
    """The largest error, relative to the largest number."""
    return float(np.abs(found - exact).max() / np.abs(exact).max())


def state_apart(found: Any, exact: Any) -> float:
    """The same of the worst layer's recurrent state."""
    ours, theirs = found.tensors(), exact.tensors()
    return max(apart(ours[name], theirs[name]) for name in ours if name.endswith("wkv"))


def drift(path: Any, tokens: int) -> list[dict[str, Any]]:
    exact = TorchRunner(load(path, dtype=torch.float64))
    runners = {
        "compiled": NativeRunner(path, threads=1, dtype="float32"),
        "torch": TorchRunner(load(path, dtype=torch.float32)),
    }
    texts = texts_of(LLM.from_runner(runners["compiled"]), 16, PIECE)
    draw, reference, read, rows = np.random.default_rng(1), exact.init_state(), 0, []
    states = {name: runner.init_state() for name, runner in runners.items()}
    places = [10**n for n in range(3, 10) if 10**n < tokens] + [tokens]
    while read < tokens:
        ids = texts[draw.integers(len(texts))][: tokens - read]
        logits, read = exact.forward(ids, reference), read + len(ids)
        found = {name: runner.forward(ids, states[name]) for name, runner in runners.items()}
        if places[0] <= read:
            places.pop(0)
            for name in runners:
                row = {"tokens": read, "float32": name, "logits": apart(found[name], logits)}
                rows.append(row | {"state": state_apart(states[name], reference)})
        print(f"\r{read:,} tokens", end="", flush=True, file=sys.stderr)
    print(file=sys.stderr)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    report("drift", drift(model_path(given.model), given.tokens), Machine(threads=1), save=given.save)


if __name__ == "__main__":
    main()
