"""Time and memory of a block's token mixing by resolution: Vision-RWKV's spatial mix beside softmax attention.

    python benchmarks/vision_resolution.py [--width 192] [--rounds 5] [--threads N] [--pixels 224,512,1024] [--save]

Whole layers with their projections, one image, patches of 16, float32: Vision-RWKV (v4, 6 and 7) with its shift, and
multi-head attention with heads of 64 channels through torch's fused kernel (SDPA), forward and forward with backward.
Memory is the growth of a fresh process's peak over one call. The crossover is where the fitted times meet.
"""

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Callable

import torch
from support import Machine, interleaved, peak_mb, report
from torch import Tensor, nn

from rookery.families.vision_rwkv import create
from rookery.models.transformer import Block, KeyValues, Place
from rookery.models.vision import SPATIAL_MIXES
from rookery.models.vit import VisionTransformer, VisionTransformerConfig
from rookery.nn.initial import normal_
from rookery.ops.dispatch import native_module

FORWARD, TRAIN = "forward", "forward and backward"
CONTENDERS = ("v4", "v6", "v7", "attention")
PATCH = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=native_module().available_cores())
    parser.add_argument("--pixels", default="224,512,1024,2048")
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--peak", nargs=3, metavar=("NAME", "PIXELS", "DIRECTION"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.peak:
        name, pixels, direction = given.peak
        print(json.dumps(peak(name, given.width, int(pixels), direction)))
        return
    rows = [
        resolution(int(pixels), direction, given)
        for pixels in given.pixels.split(",")
        for direction in (FORWARD, TRAIN)
    ]
    report("vision_resolution", rows, Machine(threads=given.threads), save=given.save)
    for direction in (FORWARD, TRAIN):
        for name in CONTENDERS[:-1]:
            print(f"{direction}: {crossover([row for row in rows if row['direction'] == direction], name)}")


def resolution(pixels: int, direction: str, given: argparse.Namespace) -> dict:
    """Times and peaks of all contenders at one size."""
    calls = {name: call(name, given.width, pixels, direction) for name in CONTENDERS}
    seconds = interleaved(calls, rounds=given.rounds)
    return {
        "pixels": pixels,
        "tokens": (pixels // PATCH) ** 2,
        "direction": direction,
        "ms": {name: 1e3 * seconds.median(name) for name in CONTENDERS},
        "attention takes": {name: seconds.ratio("attention", name) for name in CONTENDERS[:-1]},
        "MB": {name: alone(name, pixels, direction, given) for name in CONTENDERS},
    }


def call(name: str, width: int, pixels: int, direction: str) -> Callable[[], None]:
    """One layer over the tokens of one image."""
    side = pixels // PATCH
    x = torch.randn(1, side * side, width, generator=torch.Generator().manual_seed(1))
    run, module = attention(width) if name == "attention" else mixer(name, width, (side, side))
    if direction == FORWARD:
        return torch.no_grad()(lambda: run(x))
    leaves = [x.requires_grad_(), *module.parameters()]

    def train() -> None:
        torch.autograd.grad(run(x).sum(), leaves, allow_unused=True)

    return train


def mixer(variant: str, width: int, grid: tuple[int, int]) -> tuple[Callable[[Tensor], Tensor], nn.Module]:
    module = SPATIAL_MIXES[variant](create(hidden_size=width, variant=variant), 0)
    randomise(module)
    return (lambda x: module(x, grid, None)[0]), module


def attention(width: int) -> tuple[Callable[[Tensor], Tensor], nn.Module]:
    config = VisionTransformerConfig(hidden_size=width, num_hidden_layers=1, num_attention_heads=max(1, width // 64))
    block: Block = VisionTransformer(config).layers[0]
    module = block.self_attn
    randomise(module)

    def run(x: Tensor) -> Tensor:
        empty = module.heads(x[:, :0])
        return module(x, KeyValues(empty, empty), Place(torch.empty(0), x.shape[1], True, None))[0]

    return run, module


@torch.no_grad()
def randomise(module: nn.Module) -> None:
    """Every weight a number that makes no product trivial."""
    generator = torch.Generator().manual_seed(2)
    for parameter in module.parameters():
        normal_(parameter, parameter.shape[-1] ** -0.5 if parameter.squeeze().dim() > 1 else 0.3, generator)


def alone(name: str, pixels: int, direction: str, given: argparse.Namespace) -> float:
    """Megabytes by which one call raises the peak of a process of its own."""
    options = ["--width", str(given.width), "--threads", str(given.threads), "--peak", name, str(pixels), direction]
    found = subprocess.run([sys.executable, __file__, *options], capture_output=True, text=True, check=True)
    return json.loads(found.stdout)


def peak(name: str, width: int, pixels: int, direction: str) -> float:
    call(name, width, PATCH * 2, direction)()  # libraries and kernels are loaded
    run = call(name, width, pixels, direction)
    before = peak_mb()
    run()
    return peak_mb() - before


def crossover(rows: list[dict], name: str) -> str:
    """The size from which `name` stays faster than attention, between measured ones on logarithmic scales."""
    points = [(row["tokens"], row["attention takes"][name]) for row in rows]
    if points[-1][1] < 1:
        return f"{name} is slower than attention up to {points[-1][0]} tokens"
    above = [i for i, (_, ratio) in enumerate(points) if ratio < 1]
    if not above:
        return f"{name} is faster than attention from {points[0][0]} tokens or fewer"
    (t0, r0), (t1, r1) = points[above[-1]], points[above[-1] + 1]
    tokens = math.exp(math.log(t0) + math.log(t1 / t0) * -math.log(r0) / math.log(r1 / r0))
    return f"{name} is faster than attention from about {tokens:.0f} tokens, {PATCH * tokens**0.5:.0f} pixels"


if __name__ == "__main__":
    main()
