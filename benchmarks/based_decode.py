"""Tokens/s of decoding with BASED beside a transformer of equal size, at growing batch and context, in one run.

    python benchmarks/based_decode.py [--contexts 256 2048 8192] [--batches 1 8 32 128] [--threads 1] [--save]

Both models run in torch, in float32, from a state of `context` tokens: BASED's sums, windows and convolutions, and the
transformer's keys and values, which are random numbers here. Our transformer copies its cache when it appends to it, as
torch does with caches that grow; the column "reading alone" is its attention over caches that lie still, without any
other work, below which no transformer on these kernels can come. The paper's 24 times is one H100, 1.3B, batch 128,
1024 new tokens, against FlashAttention-2; nothing here can be set beside it.

The last rows are the step of the linear attention alone: the compiled one beside the chunked and the defining one.
"""

import argparse
from dataclasses import replace

import torch
from support import Machine, interleaved, report
from torch.nn.functional import scaled_dot_product_attention

from rookery.models import create_model
from rookery.ops.taylor_attention import OP
from rookery.ops.taylor_attention.cases import Case, make
from rookery.reproduce.arms import matched, parameters
from rookery.state import State

SIZES = {"hidden_size": 256, "num_hidden_layers": 6, "vocab_size": 4096}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[256, 2048, 8192])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--memory", type=float, default=4.0, help="GB that a cache may take; larger ones are left out")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    budget = parameters("based", SIZES)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 64}
    other = matched("transformer", {**SIZES, **heads}, budget=budget)
    models = {"based": create_model("based", **SIZES), "transformer": create_model("transformer", **other)}
    rows = []
    for context in given.contexts:
        for batch in given.batches:
            if (
                models["transformer"].config.state_nbytes(tokens_seen=context, batch=batch, itemsize=4)
                < given.memory * 1e9
            ):
                rows.append(decoding(models, context, batch, given.rounds))
    rows += [step(batch, given.rounds) for batch in given.batches]
    report("based_decode", rows, Machine(threads=given.threads), save=given.save)


@torch.inference_mode()
def decoding(models: dict, context: int, batch: int, rounds: int) -> dict:
    """One new token for every row, after `context` tokens."""
    tokens = torch.zeros(batch, 1, dtype=torch.int64)
    states = {name: state_of(model, context, batch) for name, model in models.items()}
    caches = [(layer.keys, layer.values) for layer in states["transformer"].layers]
    query = torch.randn(batch, caches[0][0].shape[1], 1, caches[0][0].shape[3])
    calls = {name: lambda model=model, state=states[name]: model(tokens, state) for name, model in models.items()}
    calls["reading alone"] = lambda: [scaled_dot_product_attention(query, k, v) for k, v in caches]
    seconds = interleaved(calls, rounds=rounds)
    return {
        "context": context,
        "batch": batch,
        "tokens/s": {name: batch / seconds.median(name) for name in models},
        "MB of state": {name: state.nbytes / 1e6 for name, state in states.items()},
        "based is faster": {name: seconds.ratio(name, "based") for name in calls if name != "based"},
    }


def state_of(model: torch.nn.Module, context: int, batch: int) -> State:
    """A state of `context` tokens: of a short text where it has one size, else of random numbers."""
    if model.family == "based":
        state = model(torch.randint(model.config.vocab_size, (batch, 200)))[1]
    else:
        state = model.init_state(batch).map(
            lambda t: t if t.dim() == 1 else torch.randn(*t.shape[:2], context, t.shape[3])
        )
    return replace(state, tokens_seen=torch.full((batch,), context))


@torch.inference_mode()
def step(batch: int, rounds: int) -> dict:
    """The linear attention of one block of based-360m."""
    arguments = make(
        Case(batch=batch, time=1, heads=16, key=16, value=64), torch.Generator().manual_seed(0), torch.float32
    )
    backends = ("native", "chunked", "reference")
    seconds = interleaved(
        {name: lambda run=OP.backends[name].run: run(**arguments) for name in backends}, rounds=rounds
    )
    moved = 2 * arguments["state"].nbytes
    return {
        "batch": batch,
        "step, ms": {name: 1e3 * seconds.median(name) for name in backends},
        "GB/s of the native step": moved / seconds.median("native") / 1e9,
        "native is faster": {name: seconds.ratio(name, "native") for name in backends[1:]},
    }


if __name__ == "__main__":
    main()
