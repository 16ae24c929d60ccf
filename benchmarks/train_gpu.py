"""Training on a GPU: tokens/s, share of the GPU's speed (MFU) and memory of RWKV-7 0.1B, 0.4B and 1.5B beside a GPT.

    python benchmarks/train_gpu.py [0.1b 0.4b 1.5b] [--rows 8] [--length 4096] [--compile inductor] [--save]
    python benchmarks/train_gpu.py --toy

A row is the training loop's own step on a recipe of RWKV-LM's (`pile-…`), in bfloat16 with float32 masters and AdamW,
on random tokens from a binidx file: forward, backward, update, and the one look at the loss. The GPT is our transformer
on torch's scaled_dot_product_attention, its MLP widened until it has as many parameters; both take turns.

MFU counts what the model must compute, 2 operations a weight of a matrix forward and 4 backward (the embedding is
looked up), and 9 N² forward and 24 N² backward a head and token of N channels for the recurrence (attention:
6 · length · width a layer and token for half of all pairs), whatever is computed again. It is given against the speed
of a large product of bfloat16 matrices, measured in the same run, and against `--peak`, the maker's figure in TFLOP/s.
`--toy` goes the same way with tiny models wherever torch runs, to see that it works.
"""

import argparse
import gc
import tempfile
import time
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from support import Machine, interleaved, report
from train_cpu import gpt_sizes

from rookery.data.binidx import BinIdxWriter
from rookery.families import transformer
from rookery.recipes import recipe
from rookery.registry import configure
from rookery.tokenizers import load_tokenizer
from rookery.train.config import TrainConfig, overlay
from rookery.train.loop import Run, one_step, prepare

RECIPES = {"0.1b": "pile-0.1b", "0.4b": "pile-0.4b", "1.5b": "pile-1.4b"}
"""Sizes by name -> recipes; the largest is called by either of two names."""
TOY = {
    "overrides": {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 256},
    "data": {"tokenizer": "bytes"},
    "dtype": "float32",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="*", default=[*RECIPES], metavar="SIZE", help=f"{', '.join(RECIPES)}; all")
    parser.add_argument("--rows", type=int, default=8, help="rows a step")
    parser.add_argument("--length", type=int, default=4096, help="tokens a row")
    parser.add_argument("--steps", type=int, default=5, help="steps between two looks at the clock")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--recompute", action="store_true", help="less memory, a third more work")
    parser.add_argument("--compile", default="", metavar="BACKEND", help="torch.compile of the blocks")
    parser.add_argument(
        "--peak", type=float, default=0.0, metavar="TFLOPS", help="the maker's figure, for a second MFU"
    )
    parser.add_argument("--toy", action="store_true", help="tiny models wherever torch runs")
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    if unknown := set(given.sizes) - set(RECIPES):
        parser.error(f"sizes are {', '.join(RECIPES)}, not {', '.join(unknown)}")
    if given.toy:
        given.sizes, given.rows, given.length, given.rounds, given.steps = ["0.1b"], 2, 64, 2, 1
    elif not torch.cuda.is_available():
        parser.exit(1, "train_gpu needs an NVIDIA GPU; torch.cuda.is_available() is False. --toy runs without one\n")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        rows = [row for size in given.sizes for row in measured(size, given, device, Path(folder))]
    name = torch.cuda.get_device_name() if device.type == "cuda" else Machine(threads=1).device
    report("train_gpu", rows, Machine(threads=torch.get_num_threads(), device=name), save=given.save and not given.toy)


def measured(size: str, given: argparse.Namespace, device: torch.device, folder: Path) -> list[dict[str, Any]]:
    """The rows of RWKV-7 and of the GPT of that size."""
    configs = {name: settings(size, name, given, folder) for name in ("rwkv7", "gpt")}
    runs, held = {}, {}
    for name, config in configs.items():
        runs[name], held[name] = prepared(config, folder, device)
    tokens = given.rows * given.length
    calls = {name: repeated(run, folder, given.steps) for name, run in runs.items()}
    seconds = interleaved(calls, rounds=given.rounds, warmup=1)
    product = product_speed(device, getattr(torch, configs["rwkv7"].dtype), 256 if given.toy else 8192)
    found = []
    for name, config in configs.items():
        speed = given.steps * tokens / seconds.median(name)
        reached = speed * operations(config)
        found.append(
            {
                "size": "toy" if given.toy else size,
                "model": name,
                "parameters": sum(p.numel() for p in runs[name].task.model.parameters()),
                "rows": given.rows,
                "length": given.length,
                "tokens_per_second": speed,
                "TFLOP/s": reached * 1e-12,
                "MFU of a product": reached / product,
                "MFU of the peak": reached / (given.peak * 1e12) if given.peak else None,
                "GB held at most": held[name] * 1e-9,
                "times as fast as the GPT": seconds.ratio("gpt", name),
            }
        )
    runs.clear()
    gc.collect()
    return found


def settings(size: str, name: str, given: argparse.Namespace, folder: Path) -> TrainConfig:
    """The recipe of that size, on random tokens; of a GPT of as many parameters where `name` is "gpt"."""
    config = recipe(RECIPES[size])
    own = {"steps": 1_000_000, "batch_size": given.rows, "recompute": given.recompute, "compile": given.compile}
    own |= {"out": str(folder / name), "data": {"path": str(random_tokens(folder, given.length)), "order": "shuffle"}}
    config = overlay(config, own | {"data": own["data"] | {"sequence_length": given.length}})
    if given.toy:
        config = overlay(config, TOY)
    vocabulary = config.overrides.get("vocab_size") or load_tokenizer(config.data.tokenizer).vocab_size
    width, layers = config.overrides["hidden_size"], config.overrides["num_hidden_layers"]
    if name == "rwkv7":
        return config
    return overlay(config, {"model": "transformer", "overrides": gpt_sizes(width, layers, vocabulary)})


def random_tokens(folder: Path, length: int) -> Path:
    """A binidx file of byte values, which every vocabulary has."""
    path = folder / "tokens"
    if not path.with_suffix(".bin").exists():
        draw = np.random.default_rng(0)
        with BinIdxWriter(path, 65536) as writer:
            for _ in range(64):
                writer.add(draw.integers(1, 256, 16 * length).astype(np.uint16))
    return path.with_suffix(".bin")


def prepared(config: TrainConfig, out: Path, device: torch.device) -> tuple[Run, int]:
    """The run after two steps, and the bytes of the GPU that it held at most."""
    on_gpu = device.type == "cuda"
    before = torch.cuda.memory_allocated() if on_gpu else 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    run = prepare(config)
    for _ in range(2):
        one_step(run, out)
    return run, torch.cuda.max_memory_allocated() - before if on_gpu else 0


def repeated(run: Run, out: Path, steps: int):
    def many() -> None:
        for _ in range(steps):
            one_step(run, out)
        if run.device.type == "cuda":
            torch.cuda.synchronize()  # the last update, which no loss is waited for after

    return many


def operations(config: TrainConfig) -> float:
    """A token's, forward and backward, as above."""
    vocabulary = config.overrides.get("vocab_size") or load_tokenizer(config.data.tokenizer).vocab_size
    family, sizes = configure(config.model, **{**config.overrides, "vocab_size": vocabulary})
    shapes = family.tensor_shapes(sizes)
    tables = ("emb.", "model.embed_tokens.")
    matrices = sum(prod(s) for n, s in shapes.items() if sum(d > 1 for d in s) >= 2 and not n.startswith(tables))
    width, layers = sizes.hidden_size, sizes.num_hidden_layers
    if family.name == transformer.FAMILY.name:
        return 6 * matrices + 6 * config.data.sequence_length * width * layers
    return 6 * matrices + 33 * width * sizes.head_dim * layers


def product_speed(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Operations a second of a product of square matrices, the best of five tries."""
    a = torch.randn(size, size, device=device).to(dtype)
    best = float("inf")
    for _ in range(6):
        began = time.perf_counter()
        for _ in range(10):
            b = a @ a
        float(b[0, 0])  # waits
        best = min(best, time.perf_counter() - began)
    return 10 * 2 * size**3 / best


if __name__ == "__main__":
    main()
