"""The loss curve of the embedded model.

python examples/embedded_model/plot.py out/embedded/run/metrics.jsonl loss.png
"""

import argparse
import json
from pathlib import Path


def main() -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("metrics", type=Path)
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    rows = [json.loads(line) for line in given.metrics.read_text(encoding="utf-8").splitlines()]
    held_out = [row for row in rows if "validation_nats_per_character" in row]
    figure, left = plt.subplots(figsize=(8, 4.5), layout="constrained")
    right = left.twinx()
    left.plot([row["tokens"] / 1e6 for row in rows], smooth([row["loss"] for row in rows]))
    places = [row["tokens"] / 1e6 for row in held_out]
    right.plot(places, [row["validation_nats_per_character"] for row in held_out], "o--", color="black", markersize=4)
    left.set_xlabel("million tokens")
    left.set_ylabel("training loss, nats per token")
    left.set_ylim(top=3.5)
    right.set_ylabel("● held-out, nats per character")
    left.grid(alpha=0.3)
    figure.savefig(given.out, dpi=120)


def smooth(values: list[float], keep: float = 0.95) -> list[float]:
    """Exponential mean without the bias of its start."""
    mean, weight, means = 0.0, 0.0, []
    for value in values:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        means.append(mean / weight)
    return means


if __name__ == "__main__":
    main()
