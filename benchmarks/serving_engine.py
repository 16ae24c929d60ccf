"""The engine under load: many sessions at once, and long contexts.

    python benchmarks/serving_engine.py sessions [--model FILE] [--sessions 1 8 32 128] [--save]
        [--llama-batched-bench PROGRAM --gguf FILE]
    python benchmarks/serving_engine.py contexts [--model FILE] [--contexts 1000 10000 …] [--plot PNG] [--save]

`sessions`: every session reads a prompt and writes a text, with prompts of their own and with one prompt for all. Given
llama.cpp's llama-batched-bench and the same model as a GGUF file, both take turns on the same load; it samples no
tokens, the engine takes the likeliest. `contexts`: milliseconds of a token, and memory, after so many tokens. Without
--model it is the embedded one; --random 0.1b takes random weights of a published size.
"""

import argparse
import json
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from decode import model_name, model_or_random
from support import Machine, Seconds, interleaved, report

from rookery import LLM
from rookery.engine.scheduler import Scheduler
from rookery.engine.state_cache import StateCache
from rookery.families import rwkv7

STEPS = 64
"""Tokens whose time is measured after a context."""


def load_on(llm: LLM, sessions: int, prompt: int, tokens: int, shared: bool) -> Callable[[], Scheduler]:
    """Runs the load once; the scheduler knows what was done."""
    draw = np.random.default_rng(1)
    vocab = llm.runner.config.vocab_size
    common = draw.integers(1, vocab, size=prompt - 1).tolist()
    prompts = [
        [*(common if shared else draw.integers(1, vocab, size=prompt - 1).tolist()), 1 + i] for i in range(sessions)
    ]

    def run() -> Scheduler:
        scheduler = Scheduler(llm, rows=sessions, prefill=512, cache=StateCache() if shared else None)
        for ids in prompts:
            scheduler.submit(ids, tokens, tokens=True, temperature=0, ignore_eos=True)
        scheduler.run()
        return scheduler

    return run


def batched_bench(
    program: str, gguf: str, sessions: int, prompt: int, tokens: int, shared: bool, threads: int
) -> float:
    """Seconds that llama-batched-bench takes for the load, without loading the model."""
    words = [program, "-m", gguf, "-t", str(threads), "-tb", str(threads), "-b", "2048", "-ub", "512"]
    words += ["-c", str(max(4096, 2 * sessions * (prompt + tokens))), "-npp", str(prompt), "-ntg", str(tokens)]
    words += ["-npl", str(sessions), "--output-format", "jsonl", *(["-pps", "-kvu"] if shared else [])]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    line = next(line for line in done.stdout.splitlines() if line.startswith("{"))
    return float(json.loads(line)["t"])


def measure_sessions(given: argparse.Namespace, llm: LLM) -> list[dict[str, Any]]:
    rows = []
    for sessions in given.sessions:
        for shared in (False, True):
            run = load_on(llm, sessions, given.prompt, given.tokens, shared)
            peer: list[float] = []
            load = (sessions, given.prompt, given.tokens, shared, llm.runner.threads)
            ours = []
            for turn in range(given.rounds):
                started = time.perf_counter()
                counts = run().counts
                ours.append(time.perf_counter() - started)
                if given.llama_batched_bench:
                    peer.append(batched_bench(given.llama_batched_bench, given.gguf, *load))
                print(f"{sessions} sessions, round {turn + 1}: {ours[-1]:.2f} s", *peer[-1:], flush=True)
            row = {"sessions": sessions, "prefix": "shared" if shared else "own", "seconds": statistics.median(ours)}
            row["texts' tokens/s"] = sessions * given.tokens / row["seconds"]
            row |= {"prompt tokens read": counts["prompt_tokens"], "from the cache": counts["cached_tokens"]}
            if peer:
                seconds = Seconds({"llama.cpp": peer, "engine": ours})
                low, high = seconds.spread("llama.cpp", "engine")
                row |= {"llama.cpp s": statistics.median(peer), "times faster": seconds.ratio("llama.cpp", "engine")}
                row["spread"] = f"{low:.2f}-{high:.2f}"
            rows.append(row)
    return rows


def resident() -> int:
    """Bytes of memory that the process has now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def measure_contexts(given: argparse.Namespace, llm: LLM) -> list[dict[str, Any]]:
    draw, vocab = np.random.default_rng(1), llm.runner.config.vocab_size
    session, short, rows = llm.session(), llm.session(), []
    short.feed([1])

    def step(of: Any) -> Callable[[], list[int]]:
        return lambda: list(of.stream_tokens(STEPS, temperature=0, ignore_eos=True))

    for length in given.contexts:
        while (missing := length - session.tokens_seen) > 0:
            session.feed(draw.integers(1, vocab, size=min(missing, 8192)).tolist())
            print(f"\r{session.tokens_seen:,} tokens", end="", flush=True)
        print()
        # a session that has read one token takes turns: only the ratio says what the context costs
        seconds = interleaved({"here": step(session.fork()), "fresh": step(short.fork())}, rounds=given.rounds)
        rows.append(
            {
                "context": length,
                "ms a token": 1000 * seconds.median("here") / STEPS,
                "to a fresh one's": 1 / seconds.ratio("fresh", "here"),
                "state MB": session.nbytes / 1e6,
                "process MB": resident() / 1e6,
            }
        )
    return rows


def plot(rows: list[dict[str, Any]], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    contexts = [row["context"] for row in rows]
    drawn = ((left, "to a fresh one's", "time of a token / a fresh one's"), (right, "process MB", "MB"))
    for axes, name, label in drawn:
        values = [row[name] for row in rows]
        axes.plot(contexts, values, marker="o")
        axes.set(xscale="log", xlabel="tokens of context", ylabel=label, ylim=(0, 1.25 * max(values)))
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["sessions", "contexts"])
    parser.add_argument("--model")
    parser.add_argument("--random", choices=[*rwkv7.PRESETS], metavar="SIZE")
    parser.add_argument("--quantize")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--sessions", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--llama-batched-bench", metavar="PROGRAM")
    parser.add_argument("--gguf", metavar="FILE")
    parser.add_argument("--contexts", type=int, nargs="+", default=[1000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--plot", metavar="PNG")
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    if given.llama_batched_bench and not given.gguf:
        parser.error("--llama-batched-bench needs --gguf, the same model for llama.cpp")
    with model_or_random(given.model, given.random) as path:
        llm = LLM(path, quantize=given.quantize, threads=given.threads)
        rows = (measure_sessions if given.what == "sessions" else measure_contexts)(given, llm)
    if given.plot:
        plot(rows, given.plot)
    model = {"model": model_name(given.model, given.random, given.quantize)}
    rows = [model | row for row in rows]
    report(f"serving_{given.what}", rows, Machine(threads=llm.runner.threads), save=given.save)


if __name__ == "__main__":
    main()
