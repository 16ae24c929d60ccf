"""Time and memory of a picture's reading of a prompt, by the prompt's length: CrossWKV beside cross-attention.

    python benchmarks/cross_wkv.py [--width 384] [--tokens 256] [--words 8,64,512,4096] [--rounds 5] [--threads N]

One cross layer of DIR-7, one picture, float32, no gradients. "read" is what happens once for a prompt, "look" what
happens in every step of every picture, "kept" the bytes in between, and MB how much one look raises the peak of a fresh
process. Ratios are cross-attention's time over CrossWKV's: above 1 CrossWKV is faster. `--save` keeps the figures.
"""

import argparse
import json
import math
import subprocess
import sys

import torch
from support import Machine, interleaved, peak_mb, report
from torch import nn

from rookery.families.dir7 import create
from rookery.models.dir7 import CROSSES, Text
from rookery.nn.initial import normal_
from rookery.ops.dispatch import native_module

MODES = ("text_kv", "text_read", "softmax")
TEXT_SIZE = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--tokens", type=int, default=256, help="of the picture")
    parser.add_argument("--words", default="8,64,512,4096")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=native_module().available_cores())
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--peak", nargs=2, metavar=("MODE", "WORDS"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.peak:
        print(json.dumps(peak(given.peak[0], int(given.peak[1]), given)))
        return
    rows = [length(int(words), given) for words in given.words.split(",")]
    report("cross_wkv", rows, Machine(threads=given.threads), save=given.save)


@torch.no_grad()
def length(words: int, given: argparse.Namespace) -> dict:
    """Times, bytes and peaks of all modes for prompts of one length."""
    calls, kept = {}, {}
    for mode in MODES:
        layer, x, text, grid = pieces(mode, words, given)
        memory = layer.read(text)
        kept[mode] = sum(part.numel() * part.element_size() for part in memory)
        calls[f"{mode} read"] = torch.no_grad()(lambda layer=layer, text=text: layer.read(text))
        calls[f"{mode} look"] = torch.no_grad()(
            lambda layer=layer, x=x, grid=grid, memory=memory: layer(x, grid, memory, None)
        )
    seconds = interleaved(calls, rounds=given.rounds)
    return {
        "words": words,
        "ms": {name: 1e3 * seconds.median(name) for name in calls},
        "attention takes": {mode: seconds.ratio("softmax look", f"{mode} look") for mode in MODES[:-1]},
        "kept KB": {mode: size / 1000 for mode, size in kept.items()},
        "MB": {mode: alone(mode, words, given) for mode in MODES},
    }


def pieces(mode: str, words: int, given: argparse.Namespace) -> tuple[nn.Module, torch.Tensor, Text, tuple[int, int]]:
    """A layer with weights that make no product trivial, a picture's tokens, a prompt, the picture's grid."""
    config = create(hidden_size=given.width, num_hidden_layers=1, cross=mode, text_size=TEXT_SIZE)
    layer, generator = CROSSES[mode](config, 0), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in layer.parameters():
            normal_(parameter, parameter.shape[-1] ** -0.5 if parameter.squeeze().dim() > 1 else 0.3, generator)
    x = torch.randn(1, given.tokens, given.width, generator=generator)
    text = Text(torch.randn(1, words, TEXT_SIZE, generator=generator), torch.ones(1, words, dtype=torch.bool))
    rows = math.isqrt(given.tokens)
    while given.tokens % rows:
        rows -= 1
    return layer, x, text, (rows, given.tokens // rows)


def alone(mode: str, words: int, given: argparse.Namespace) -> float:
    """Megabytes by which one look raises the peak of a process of its own."""
    options = ["--width", str(given.width), "--tokens", str(given.tokens), "--threads", str(given.threads)]
    command = [sys.executable, __file__, *options, "--peak", mode, str(words)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@torch.no_grad()
def peak(mode: str, words: int, given: argparse.Namespace) -> float:
    layer, x, text, grid = pieces(mode, 2, given)
    layer(x, grid, layer.read(text), None)  # libraries and kernels are loaded
    layer, x, text, grid = pieces(mode, words, given)
    memory = layer.read(text)
    before = peak_mb()
    layer(x, grid, memory, None)
    return peak_mb() - before


if __name__ == "__main__":
    main()
