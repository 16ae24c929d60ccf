"""Training tokens/s of RWKV-7 against a GPT of the same size on this CPU, in one interleaved run.

    python benchmarks/train_cpu.py --save

One optimiser step each (forward, backward, AdamW on float32 masters) of the same vocabulary, width, depth and number of
tokens, at 512 and at 4,096 tokens a row. The GPT is our transformer on torch's scaled_dot_product_attention, its MLP
widened until the parameters match.
"""

import argparse

import torch
from support import Machine, interleaved, report

from rookery.data.text import Corpus, Windows
from rookery.models import create_model
from rookery.train.config import OptimConfig
from rookery.train.optim import Optimizer
from rookery.train.tasks.language import language_loss


def parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def models(width: int, layers: int, vocabulary: int) -> dict[str, torch.nn.Module]:
    """An RWKV-7 and the transformer whose MLP makes up for the difference."""
    rwkv = create_model("rwkv7", hidden_size=width, num_hidden_layers=layers, vocab_size=vocabulary)
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "vocab_size": vocabulary}
    plain = create_model("transformer", device="meta", **sizes)
    wider = round((parameters(rwkv) - parameters(plain)) / (3 * width * layers * 32)) * 32
    ffn = plain.config.intermediate_size + wider
    return {"rwkv7": rwkv, "gpt": create_model("transformer", intermediate_size=ffn, **sizes)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=4096, help="tokens a step, whatever the row length")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
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
            seconds = interleaved(calls, rounds=given.rounds)
            rows.append(
                {
                    "dtype": dtype,
                    "length": length,
                    "parameters": {name: parameters(model) for name, model in built.items()},
                    "tokens_per_second": {name: given.tokens / seconds.median(name) for name in calls},
                    "rwkv7_over_gpt": seconds.ratio("gpt", "rwkv7"),
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


if __name__ == "__main__":
    main()
