"""Decodes 1,000,000 tokens with a small RWKV-X and measures time per token and bytes of the cache on the way.

    python benchmarks/rwkv_x_decode.py [--tokens 1048576] [--read 4096] [--out FOLDER] [--save]

Every token goes through the model by itself; with `--read`, so many at a time beyond the first 8192 tokens, but for the
last 256 of every 8192. At each power of four the steps of RWKV-X, of the RWKV-7 within it and of
two twins without a limit are timed in turn: "sparse" chooses the same number of chunks among all, "full" attends to all
entries. The twins' caches are filled with noise, not read; "full" leaves out the chunk that is filling and copies
nothing, so its time is a lower bound. The run keeps its state in FOLDER every 16,384 tokens; the same command goes on.
`--save` writes rwkv_x_decode.json and .png to benchmarks/results.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from support import RESULTS, Machine, interleaved, report
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from rookery.checkpoints.atomic import replacing
from rookery.models import create_model
from rookery.models.rwkv_x import RWKVX, SparseState
from rookery.nn import chunk_cache
from rookery.state import State

SIZES = {
    "vocab_size": 256,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_sparse_layers": 1,
    "head_dim": 64,
    "intermediate_size": 256,
    "chunk_size": 256,
    "topk": 3,
}
LIMITS = {"max_entries": 8192, "min_entries": 6144, "window": 1024}
LABELS = {"rwkv-x": "RWKV-X", "rwkv-7": "the RWKV-7 in it", "sparse": "no limit, sparse", "full": "no limit, full"}
BLOCK = 256
"""Steps that one point of the curve is the median of."""
STRETCH = 8192
"""Tokens between blocks where the rest is not decoded but read."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1 << 20)
    parser.add_argument("--first", type=int, default=1024, help="tokens after which twins are timed first")
    parser.add_argument("--rounds", type=int, default=64, help="steps of each contender")
    parser.add_argument("--keep-every", type=int, default=16384, help="tokens between kept states")
    parser.add_argument("--read", type=int, default=1, help="tokens read at a time between the blocks that are decoded")
    parser.add_argument("--out", type=Path, default=Path("out/rwkv_x_decode"))
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = Decoding(given.out).run(given)
    rows = found["rows"]
    report("rwkv_x_decode", rows, Machine(threads=1), save=given.save)
    # beyond the limit nothing may grow: from its first length on
    flat = [row["µs a step"]["rwkv-x"] for row in rows if row["tokens"] > LIMITS["max_entries"]]
    if flat:
        print(f"rwkv-x beyond {LIMITS['max_entries']} tokens: slowest / fastest = {max(flat) / min(flat):.2f}")
    if given.save:
        with replacing(RESULTS / "rwkv_x_decode.png") as path:
            draw(found, path)


class Decoding:
    """The run, which can be interrupted."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = create_model("rwkv-x", **SIZES, **LIMITS)
        with torch.no_grad():  # the published initial values set whole matrices to zero
            for parameter in self.model.moba.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        self.kept, self.progress = folder / "state.safetensors", folder / "progress.json"

    @torch.inference_mode()
    def run(self, given: argparse.Namespace) -> dict[str, Any]:
        """Rows of the table, and the curve: [tokens, median µs of the block before, bytes]."""
        found: dict[str, Any] = {"rows": [], "curve": []}
        state = self.model.init_state(1)
        if self.progress.exists():
            found = json.loads(self.progress.read_text(encoding="utf-8"))
            state = State.load(self.kept, self.model)
        seen = int(state.tokens_seen)
        generator = torch.Generator().manual_seed(2 + seen)
        while seen < given.tokens:
            rest = STRETCH - BLOCK if given.read > 1 and seen >= STRETCH else 0
            for some in self.tokens(generator, rest).split(given.read, dim=1):
                _, state = self.model.features(some, state, None)
            times = []
            for token in self.tokens(generator, BLOCK).split(1, dim=1):
                began = time.perf_counter()
                _, state = self.model(token, state)
                times.append(time.perf_counter() - began)
            seen += rest + BLOCK
            found["curve"].append([seen, 1e6 * statistics.median(times), state.nbytes])
            # at powers of four of BLOCK
            if seen >= given.first and seen & (seen - 1) == 0 and (seen.bit_length() - BLOCK.bit_length()) % 2 == 0:
                found["rows"].append(measure(self.model, state, given.rounds))
                print(found["rows"][-1], flush=True)
            if seen % given.keep_every == 0:
                self.keep(state, found)
        return found

    def tokens(self, generator: torch.Generator, count: int) -> Tensor:
        """So many random tokens, [1, count]."""
        return torch.randint(SIZES["vocab_size"], (1, count), generator=generator)

    def keep(self, state: State, found: dict[str, Any]) -> None:
        """The state first: what the progress speaks of is there."""
        self.folder.mkdir(parents=True, exist_ok=True)
        state.save(self.kept, self.model)
        with replacing(self.progress) as path:
            path.write_text(json.dumps(found), encoding="utf-8")


def measure(model: RWKVX, state: State, rounds: int) -> dict[str, Any]:
    """One step of each contender after as many tokens as `state` has read."""
    tokens, token = int(state.tokens_seen), torch.zeros(1, 1, dtype=torch.int64)
    twin = RWKVX(replace(model.config, max_entries=0)).requires_grad_(False)
    twin.load_state_dict(model.state_dict())
    filled = fill(twin, tokens)
    recurrent = model.rwkv(token)[1]

    def full() -> None:
        with attending_to_everything():
            twin(token, filled)

    calls = {
        "rwkv-x": lambda: model(token, state),
        "rwkv-7": lambda: model.rwkv(token, recurrent),
        "sparse": lambda: twin(token, filled),
        "full": full,
    }
    seconds = interleaved(calls, rounds=rounds, warmup=3)
    return {
        "tokens": tokens,
        "µs a step": {name: 1e6 * seconds.median(name) for name in calls},
        "bytes": {"rwkv-x": state.nbytes, "rwkv-7": recurrent.nbytes, "without a limit": filled.nbytes},
    }


def fill(model: RWKVX, tokens: int) -> State:
    """A state as `tokens` tokens leave it, its cache full of noise."""
    complete, filling = model.config.places(tokens)
    heads, dim, size = model.config.num_heads, model.config.head_dim, model.config.chunk_size

    def noise(entries: int) -> Tensor:
        return torch.randn(1, entries, heads, dim, generator=torch.Generator().manual_seed(3))

    state = model.init_state(1)
    layers = [
        layer._replace(
            past_keys=noise(complete),
            past_values=noise(complete),
            keys=noise(filling),
            values=noise(filling),
            chunk_means=noise(complete // size),
        )
        if isinstance(layer, SparseState)
        else layer
        for layer in state.layers
    ]
    return replace(state, layers=tuple(layers), tokens_seen=torch.tensor([tokens]))


@contextmanager
def attending_to_everything() -> Iterator[None]:
    """Within, sparse attention is a softmax over all complete chunks."""

    def everything(*, q: Tensor, past_k: Tensor, past_v: Tensor, **_: Any) -> Tensor:
        return scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, past_k, past_v))).transpose(1, 2)

    own, chunk_cache.chunk_attention = chunk_cache.chunk_attention, everything
    try:
        yield
    finally:
        chunk_cache.chunk_attention = own


def draw(found: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    times, sizes = figure.subplots(1, 2)
    tokens, steps, held = zip(*found["curve"])
    times.plot(tokens, [us / 1000 for us in steps], color="C0", lw=0.7, label=f"RWKV-X, medians of {BLOCK} steps")
    at = [row["tokens"] for row in found["rows"]]
    for number, name in enumerate(("rwkv-x", "rwkv-7", "sparse", "full")):
        label = {"rwkv-x": "RWKV-X", "rwkv-7": "the RWKV-7 in it", "sparse": "no limit, sparse"}.get(
            name, "no limit, full"
        )
        values = [row["µs a step"][name] / 1000 for row in found["rows"]]
        times.plot(at, values, "o--", color=f"C{number}", ms=4, lw=0.8, label=label)
    times.set(ylabel="ms a token", title="a decoding step")
    sizes.plot(tokens, held, color="C0", label="RWKV-X")
    sizes.plot(at, [row["bytes"]["without a limit"] for row in found["rows"]], "o--", color="C2", label="no limit")
    sizes.plot(at, [row["bytes"]["rwkv-7"] for row in found["rows"]], "o--", color="C1", label="the RWKV-7 in it")
    sizes.set(ylabel="bytes", title="state and cache")
    for axes in (times, sizes):
        axes.set(xscale="log", yscale="log", xlabel="tokens decoded")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=110, format="png")


if __name__ == "__main__":
    main()
