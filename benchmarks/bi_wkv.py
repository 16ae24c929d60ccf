"""Milliseconds of the attentions of Vision-RWKV by resolution, beside softmax attention of the same width.

    python benchmarks/bi_wkv.py [--width 192] [--rounds 7] [--threads N] [--save]

One layer's attention without its projections, float32, forward and forward with backward, for images of 224 to 2048
pixels in patches of 16. Softmax attention is torch's own, with heads of 64 channels.
"""

import argparse
from collections.abc import Callable

import torch
from support import Machine, interleaved, report

from rookery.ops import bi_wkv, bi_wkv6
from rookery.ops.bi_wkv.cases import Case
from rookery.ops.bi_wkv.cases import make as make_v4
from rookery.ops.bi_wkv6.cases import make as make_v6
from rookery.ops.dispatch import native_module
from rookery.ops.wkv6.cases import Case as Headed

PIXELS = (224, 512, 1024, 2048)
FORWARD, TRAIN = "forward", "forward and backward"
LARGEST_ATTENTION = 4096
"""Tokens beyond which softmax attention is not waited for."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=native_module().available_cores())
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    rows = [
        resolution(pixels, given.width, direction, given.rounds) for pixels in PIXELS for direction in (FORWARD, TRAIN)
    ]
    report("bi_wkv", rows, Machine(threads=given.threads), save=given.save)


def resolution(pixels: int, width: int, direction: str, rounds: int) -> dict:
    tokens, generator = (pixels // 16) ** 2, torch.Generator().manual_seed(1)
    call = make_v4(Case(batch=1, time=tokens, channels=width), generator, torch.float32)
    headed = make_v6(
        Headed(batch=1, time=tokens, heads=width // 64, key=64, value=64), generator, torch.float32
    )  # fmt: skip
    contenders = {
        f"bi_wkv {name}": (backend.run, call)
        for name, backend in bi_wkv.OP.backends.items()
        if name in ("native", "cumsum") and backend.why_not(**call) is None
    }
    contenders["bi_wkv6"] = (bi_wkv6.bi_wkv6, headed)
    if tokens <= LARGEST_ATTENTION:
        query = {name: headed["r"].transpose(1, 2).contiguous() for name in ("query", "key", "value")}
        contenders["attention"] = (torch.nn.functional.scaled_dot_product_attention, query)
    calls = {name: timed(run, arguments, direction) for name, (run, arguments) in contenders.items()}
    seconds = interleaved(calls, rounds=rounds)
    others = [name for name in contenders if name != "bi_wkv native"]
    return {
        "pixels": pixels,
        "tokens": tokens,
        "direction": direction,
        "ms": {name: 1e3 * seconds.median(name) for name in contenders},
        "native is faster": {name: seconds.ratio(name, "bi_wkv native") for name in others},
    }


def timed(run: Callable, arguments: dict, direction: str) -> Callable:
    if direction == FORWARD:
        return torch.no_grad()(lambda: run(**arguments))
    leaves = {n: x.detach().requires_grad_() for n, x in arguments.items() if torch.is_tensor(x)}

    def train() -> None:
        torch.autograd.grad(run(**arguments | leaves).sum(), list(leaves.values()))

    return train


if __name__ == "__main__":
    main()
