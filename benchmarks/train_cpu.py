"""Training tokens/s of RWKV-7 against a GPT of the same size, and against itself without kernels.

    python benchmarks/train_cpu.py --save

Contenders take turns in one run. One optimiser step each (forward, backward, AdamW on float32 masters) of the same
vocabulary, width, depth and number of tokens, at 512 and at 4,096 tokens a row. The GPT is our transformer on torch's
scaled_dot_product_attention, its MLP widened until the parameters match. `--naive` adds, in float32 at 512 tokens a
row, the same RWKV-7 on the reference of every operator: plain torch with a loop over the tokens, which is how it runs
without kernels. A step of that takes half a minute or so.
"""

import argparse
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
from support import Machine, interleaved, report

from rookery.data.text import Corpus, Windows
from rookery.models import create_model
from rookery.ops import linear_cross_entropy, relu_squared, token_shift, wkv7, wkv7_inputs, wkv7_output
from rookery.train.config import OptimConfig
from rookery.train.optim import Optimizer
from rookery.train.tasks.language import language_loss

OPS = [m.OP for m in (linear_cross_entropy, relu_squared, token_shift, wkv7, wkv7_inputs, wkv7_output)]
"""All that an RWKV-7 calls in training."""


def parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def models(width: int, layers: int, vocabulary: int) -> dict[str, torch.nn.Module]:
    """An RWKV-7 and the transformer whose MLP makes up for the difference."""
    sizes = gpt_sizes(width, layers, vocabulary)
    rwkv = {name: value for name, value in sizes.items() if name != "intermediate_size"}
    return {"rwkv7": create_model("rwkv7", **rwkv), "gpt": create_model("transformer", **sizes)}


def gpt_sizes(width: int, layers: int, vocabulary: int) -> dict[str, int]:
    """Sizes of a transformer of as many parameters as the RWKV-7 of that width, depth and vocabulary."""
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "vocab_size": vocabulary}
    rwkv, plain = (create_model(name, device="meta", **sizes) for name in ("rwkv7", "transformer"))
    wider = round((parameters(rwkv) - parameters(plain)) / (3 * width * layers * 32)) * 32
    return sizes | {"intermediate_size": plain.config.intermediate_size + wider}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=4096, help="tokens a step, whatever the row length")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--naive", action="store_true", help="also without kernels")
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    generator = torch.Generator().manual_seed(0)
    corpus = Corpus(torch.randint(1, given.vocabulary, (1 << 20,), generator=generator).numpy(), 1 << 20)
    rows = []
    for dtype in ("bfloat16", "float32"):
        for length in (512, 4096):
            built = models(given.width, given.layers, given.vocabulary)
            windows = Windows(corpus, length, seed=0)
            calls = {name: step(model, dtype, windows, given.tokens // length) for name, model in built.items()}
            if given.naive and (dtype, length) == ("float32", 512):
                calls["naive"] = without_kernels(step(fresh_rwkv(given), dtype, windows, given.tokens // length))
            seconds = interleaved(calls, rounds=given.rounds)
            rows.append(
                {
                    "dtype": dtype,
                    "length": length,
                    "parameters": {name: parameters(model) for name, model in built.items()},
                    "tokens_per_second": {name: given.tokens / seconds.median(name) for name in calls},
                    "rwkv7_over_gpt": seconds.ratio("gpt", "rwkv7"),
                    "rwkv7_over_naive": seconds.ratio("naive", "rwkv7") if "naive" in calls else None,
                }
            )
    report("train_cpu", rows, Machine(threads=given.threads), save=given.save)


def step(model: torch.nn.Module, dtype: str, windows: Windows, batch: int):
    """A function that does the next optimiser step of `model`."""
    optimizer = Optimizer(model, OptimConfig(), getattr(torch, dtype))
    done = 0

    def run() -> None:
        nonlocal done
        done += 1
        language_loss(model, *windows.batch(done, batch)).backward()
        optimizer.step(1e-4)

    return run


def fresh_rwkv(given: argparse.Namespace) -> torch.nn.Module:
    return models(given.width, given.layers, given.vocabulary)["rwkv7"]


@contextmanager
def only_references() -> Iterator[None]:
    """Leaves every operator nothing but its definition."""
    with ExitStack() as stack:
        for op in OPS:
            stack.enter_context(patch.dict(op.backends, {"reference": op.backends["reference"]}, clear=True))
        yield


def without_kernels(run):
    """`run` on the references."""

    def slow() -> None:
        with only_references():
            run()

    return slow


if __name__ == "__main__":
    main()
