"""Where the time of a training step goes: RWKV-7 on this CPU under torch's profiler.

    python benchmarks/train_profile.py --save

The same model and step as `train_cpu.py`, at 512 tokens a row in float32. Times are those spent in an operator itself,
not in what it calls, added up by kind over the steps after a warm-up; the profiler's own cost is in "everything else".
"""

import argparse

import torch
from support import Machine, report
from torch.profiler import ProfilerActivity, profile
from train_cpu import models, step

from rookery.data.text import Corpus, Windows

KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm"),
    "recurrence": ("rookery::wkv7_native",),
    "inputs and output of the recurrence": ("rookery::wkv7_inputs", "rookery::wkv7_output"),
    "token shift": ("rookery::token_shift",),
    "squared ReLU": ("rookery::relu_squared",),
    "loss (without its matrix products)": ("rookery::cross_entropy", "Chunked"),
    "layer norm": ("native_layer_norm",),
    "optimiser": ("_fused_adamw", "aten::_foreach", "linalg_vector_norm", "Optimizer.step"),
    "additions, products, tanh, sigmoid": ("aten::add", "aten::mul", "aten::sub", "aten::lerp", "tanh", "sigmoid"),
    "copies, concatenations, zeros": ("aten::copy_", "aten::clone", "aten::cat", "aten::fill_", "aten::zero_"),
}
"""Kind -> what the names of its operators contain; the longest that fits decides."""


def kind(operator: str) -> str:
    """The kind of an operator, "everything else" where none fits."""
    # the forward of a custom operator runs under the name of its autograd node, GeneratedBackwardFor_rookery_wkv7_…
    plain = operator.replace("::", "_")
    fits = [(len(part), name) for name, group in KINDS.items() for part in group if part.replace("::", "_") in plain]
    return max(fits)[1] if fits else "everything else"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=4096, help="tokens a step")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--operators", action="store_true", help="print every operator instead")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    generator = torch.Generator().manual_seed(0)
    corpus = Corpus(torch.randint(1, given.vocabulary, (1 << 20,), generator=generator).numpy(), 1 << 20)
    model = models(given.width, given.layers, given.vocabulary)["rwkv7"]
    run = step(model, "float32", Windows(corpus, 512, seed=0), given.tokens // 512)
    for _ in range(2):
        run()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(given.steps):
            run()
    events = profiler.key_averages()
    if given.operators:
        print(events.table(sort_by="self_cpu_time_total", row_limit=40))
        return
    total = sum(event.self_cpu_time_total for event in events)
    spent: dict[str, float] = {}
    for event in events:
        spent[kind(event.key)] = spent.get(kind(event.key), 0.0) + event.self_cpu_time_total
    rows = [
        {"what": what, "ms_a_step": time / given.steps / 1000, "share": time / total}
        for what, time in sorted(spent.items(), key=lambda item: -item[1])
    ]
    report("train_profile", rows, Machine(threads=given.threads), save=given.save)


if __name__ == "__main__":
    main()
