"""What states kept in 16 bits cost: bytes saved, error of what follows, time to keep and to find.

    python benchmarks/snapshots.py [--model FILE] [--texts 8] [--save]

The model writes texts; each is then read again by a session whose state was rounded once, after its first half, or
every 32 tokens from there on, as in a conversation that is resumed turn by turn. The error is the divergence from the
exact model's distributions over the second half, in nats per token, and the share of tokens that both find likeliest.
Weights are made float32: products of bfloat16 numbers bring more noise of their own than this. Without --model it is
the embedded one.
"""

import argparse
from typing import Any

import numpy as np
from support import Machine, interleaved, report

from rookery import LLM
from rookery.engine.half_state import HALVES, halved
from rookery.engine.llm import model_path
from rookery.engine.position import Position
from rookery.engine.runners.native import NativeRunner
from rookery.engine.sampling import log_softmax
from rookery.engine.session import CHUNK
from rookery.engine.state_cache import StateCache

TURN = 32
"""Tokens between two roundings, where there are many."""


def texts_of(llm: LLM, count: int, tokens: int) -> list[list[int]]:
    """Texts that the model itself thinks likely."""
    found = []
    for seed in range(count):
        session = llm.session()
        session.feed([0])
        found.append([0, *session.stream_tokens(tokens - 1, seed=seed, top_p=0.9, ignore_eos=True)])
    return found


def followed(llm: LLM, tokens: list[int], dtype: str | None, often: bool) -> np.ndarray:
    """Log probabilities [half, vocab] over the second half, with the state rounded on the way."""
    state, half, rows = llm.fresh_state(), len(tokens) // 2, []
    for start in range(0, half, CHUNK):
        llm.runner.forward(tokens[start : min(start + CHUNK, half)], state, "none")
    for start in range(half, len(tokens), TURN):
        if dtype is not None and (often or start == half):
            state = llm.runner.init_state(halved(state, dtype).tensors())
        rows.append(llm.runner.forward(tokens[start : start + TURN], state, "all"))
    return log_softmax(np.concatenate(rows))


def errors(llm: LLM, texts: list[list[int]], dtype: str, often: bool) -> dict[str, Any]:
    divergences, agree = [], []
    for tokens in texts:
        exact, rounded = (followed(llm, tokens, kind, often).astype(np.float64) for kind in (None, dtype))
        divergences.append((np.exp(exact) * (exact - rounded)).sum(1))
        agree.append(exact.argmax(1) == rounded.argmax(1))
    found = np.concatenate(divergences)
    return {"nats a token": float(found.mean()), "worst": float(found.max()), "same likeliest": float(np.mean(agree))}


def times(llm: LLM, tokens: list[int], rounds: int) -> dict[str, dict[str, float]]:
    """Microseconds to keep and to find a state, by type."""
    state = llm.fresh_state()
    at = Position(state, llm.runner.forward(tokens, state)[-1])
    caches = {dtype: StateCache(dtype=dtype) for dtype in ("float32", *HALVES)}
    for cache in caches.values():
        cache.bind(llm.runner)
        cache.keep(tokens, at)

    def keeping(cache: StateCache) -> None:
        cache.clear()
        cache.keep(tokens, at)

    kept = interleaved({dtype: lambda c=cache: keeping(c) for dtype, cache in caches.items()}, rounds=rounds)
    found = interleaved({dtype: lambda c=cache: c.find(tokens) for dtype, cache in caches.items()}, rounds=rounds)
    return {dtype: {"keep µs": 1e6 * kept.median(dtype), "find µs": 1e6 * found.median(dtype)} for dtype in caches}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--texts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    llm = LLM.from_runner(NativeRunner(model_path(given.model), threads=1, dtype="float32"))
    texts = texts_of(llm, given.texts, given.tokens)
    spent, state = times(llm, texts[0], given.rounds), llm.fresh_state()
    llm.runner.forward(texts[0][:100], state, "none")
    rows = [{"kept in": "float32", "rounded": "never", "state bytes": state.nbytes, **spent["float32"]}]
    for dtype in HALVES:
        for often in (False, True):
            row = {"kept in": dtype, "rounded": f"every {TURN} tokens" if often else "once"}
            row |= {"state bytes": halved(state, dtype).nbytes, **spent[dtype], **errors(llm, texts, dtype, often)}
            rows.append(row)
    report("snapshots", rows, Machine(threads=1), save=given.save)


if __name__ == "__main__":
    main()
