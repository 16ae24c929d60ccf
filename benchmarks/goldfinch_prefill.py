"""Times GoldFinch's prompts: all tokens through the attention, or the last few alone, at growing lengths.

    python benchmarks/goldfinch_prefill.py [--longest 16384] [--rounds 3] [--save]

The slope is that of the logarithms at the two longest prompts: 1 is linear, 2 quadratic. Random weights. `--save`
writes goldfinch_prefill.json to benchmarks/results.
"""

import argparse
import math

import torch
from support import Machine, interleaved, report

from rookery.models import create_model

SIZES = {"vocab_size": 256, "hidden_size": 128, "num_hidden_layers": 3, "head_dim": 64, "intermediate_size": 448}

CONTENDERS = ("last alone", "all")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shortest", type=int, default=1024)
    parser.add_argument("--longest", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    model = create_model("goldfinch", **SIZES)
    lengths = [given.shortest]
    while lengths[-1] * 2 <= given.longest:
        lengths.append(lengths[-1] * 2)
    rows = []
    with torch.inference_mode():
        for length in lengths:
            tokens = torch.randint(SIZES["vocab_size"], (1, length), generator=torch.Generator().manual_seed(0))
            times = interleaved(
                {
                    "last alone": lambda tokens=tokens: model.last_features(tokens, None, 1),
                    "all": lambda tokens=tokens: model.features(tokens),
                },
                rounds=given.rounds,
            )
            rows.append({"tokens": length, **{f"ms, {name}": 1e3 * times.median(name) for name in CONTENDERS}})
    report("goldfinch_prefill", rows, Machine(threads=1), save=given.save)
    if len(rows) > 1:
        for name in CONTENDERS:
            slope = math.log2(rows[-1][f"ms, {name}"] / rows[-2][f"ms, {name}"])
            print(f"slope, {name}: {slope:.2f}")


if __name__ == "__main__":
    main()
