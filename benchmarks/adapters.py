"""What an adapter beside the weights costs the compiled runtime, against none and against the merged model.

    python benchmarks/adapters.py [--model FILE | --random 0.1b] [--quantize int8] [--ranks 16 64] [--rows 1 8 64]
        [--save]

A LoRA of every matrix but the head. Rows decode a token at a time: all without an adapter, all with one, each with one
of its own, and all in the model that the adapter was merged into; then a prompt is read. Times are ratios to those
without.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from decode import model_or_random
from safetensors.numpy import save_file
from support import Machine, interleaved, report

from rookery.checkpoints import open_checkpoint
from rookery.checkpoints.adapter import Adapter, adapted, read_adapter
from rookery.engine.llm import model_path
from rookery.engine.runners.native import NativeRunner

STEPS = 8


def lora(runner: NativeRunner, rank: int, seed: int, folder: Path) -> Adapter:
    """A LoRA with random factors, small enough that sums stay in range."""
    rng, factors = np.random.default_rng(seed), {}
    for name, (out, into) in runner._model.matrices.items():
        if name != "head.weight":
            module = name.removesuffix(".weight")
            factors[f"{module}.lora_A"] = rng.normal(scale=into**-0.5, size=(rank, into)).astype(np.float32)
            factors[f"{module}.lora_B"] = rng.normal(scale=0.01, size=(out, rank)).astype(np.float32)
    save_file(factors, folder / f"{rank}-{seed}.safetensors")
    return read_adapter(folder / f"{rank}-{seed}.safetensors", alpha=rank)


def decoding(runners: list[NativeRunner]) -> Callable[[], None]:
    """A few steps of one row for each of `runners`, which share their weights."""
    states, ids = [runner.init_state() for runner in runners], [[1 + row] for row in range(len(runners))]

    def run() -> None:
        for _ in range(STEPS):
            runners[0].forward_rows(ids, states, ["last"] * len(ids))

    return run


def reading(runner: NativeRunner, tokens: int) -> Callable[[], None]:
    """A prompt."""
    ids = np.random.default_rng(1).integers(1, runner.config.vocab_size, size=tokens).tolist()
    return lambda: runner.forward(ids, runner.init_state())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model file (the embedded one)")
    parser.add_argument("--random", metavar="SIZE", help="random bfloat16 weights of a published size, as 0.1b")
    parser.add_argument("--quantize", choices=["int8", "int4"])
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--prompt", type=int, default=512, help="tokens (%(default)s)")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    how = {"quantize": given.quantize, "threads": given.threads}
    rows = []
    with model_or_random(given.model, given.random) as path, tempfile.TemporaryDirectory() as folder:
        checkpoint = open_checkpoint(model_path(path))
        base = NativeRunner(checkpoint, **how)
        for rank in given.ranks:
            loras = [lora(base, rank, seed, Path(folder)) for seed in range(max(given.rows))]
            merged, own = NativeRunner(adapted(checkpoint, loras[0]), **how), [base.adapted(one) for one in loras]
            for count in given.rows:
                calls = {"none": decoding([base] * count), "one": decoding([own[0]] * count)}
                calls |= {"own": decoding(own[:count]), "merged": decoding([merged] * count)}
                rows.append(row_of(f"decode {count}", rank, calls, given.rounds))
            calls = {name: reading(runner, given.prompt) for name, runner in (("none", base), ("one", own[0]))}
            rows.append(
                row_of(f"read {given.prompt}", rank, calls | {"merged": reading(merged, given.prompt)}, given.rounds)
            )
    report("adapters", rows, Machine(threads=base.threads), save=given.save)


def row_of(what: str, rank: int, calls: dict[str, Callable[[], None]], rounds: int) -> dict[str, object]:
    """Milliseconds without an adapter, and how many times that the others take."""
    seconds = interleaved(calls, rounds=rounds)
    row = {"what": what, "rank": rank, "ms without": 1e3 * seconds.median("none")}
    for name in calls:
        if name != "none":
            low, high = seconds.spread(name, "none")
            row |= {name: seconds.ratio(name, "none"), f"{name} spread": f"{low:.2f}-{high:.2f}"}
    return row


if __name__ == "__main__":
    main()
