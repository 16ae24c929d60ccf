"""What it costs to bind a text to a form: time of the masks beside that of the model's steps.

    python benchmarks/grammar.py [--model FILE | --random 0.1b] [--tokens 64] [--save]

For a JSON schema, a regular expression and a Lark grammar: milliseconds to make the grammar, microseconds of a mask
(median and 99th percentile over random texts that obey it), and of the whole step with and without. Without --model it
is the embedded one; --random takes random weights of a published size, whose 65,536 tokens cost more.
"""

import argparse
import time
from typing import Any

import numpy as np
from decode import model_name, model_or_random
from support import Machine, interleaved, report

from rookery import LLM
from rookery.engine.grammar import Grammar, json_schema, lark, regex
from rookery.families import rwkv7

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "minItems": 20},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
SUMS = """start: term ("+" term){50}
term: /[0-9]+/ | "(" term "*" term ")"
"""


def forms() -> dict[str, Grammar]:
    return {"JSON schema": json_schema(SCHEMA), "regex": regex("([a-z]{1,8} ){60}"), "Lark grammar": lark(SUMS)}


def masks(llm: LLM, grammar: Grammar, tokens: int) -> tuple[float, list[float]]:
    """Seconds to start, and of every mask of a text whose tokens are drawn from those allowed."""
    started = time.perf_counter()
    constraint = llm.guide.start(grammar)
    begin = time.perf_counter() - started
    draw, times = np.random.default_rng(1), []
    for _ in range(tokens):
        started = time.perf_counter()
        allowed = np.flatnonzero(constraint.allowed())
        times.append(time.perf_counter() - started)
        allowed = allowed[allowed != 0]
        if not len(allowed):
            break
        constraint.accept(int(draw.choice(allowed)))
        if constraint.complete:
            break
    return begin, times


def measure(given: argparse.Namespace, llm: LLM) -> list[dict[str, Any]]:
    started = time.perf_counter()
    _ = llm.guide
    rows: list[dict[str, Any]] = [{"form": "(tokenizer, once)", "start ms": 1000 * (time.perf_counter() - started)}]
    session = llm.session()
    session.feed("Once upon a time")

    def writer(grammar: Grammar | None) -> Any:
        def run() -> int:
            stream = session.fork().stream_tokens(given.tokens, seed=1, ignore_eos=True, grammar=grammar)
            return len(list(stream))

        return run

    for name, grammar in forms().items():
        begin, times = masks(llm, grammar, given.tokens)
        lengths = {kind: writer(form)() for kind, form in (("bound", grammar), ("free", None))}
        seconds = interleaved({"bound": writer(grammar), "free": writer(None)}, rounds=given.rounds)
        rows.append(
            {
                "form": name,
                "start ms": 1000 * begin,
                "mask µs": 1e6 * float(np.median(times)),
                "99% µs": 1e6 * float(np.quantile(times, 0.99)),
                "step ms bound": 1000 * seconds.median("bound") / lengths["bound"],
                "step ms free": 1000 * seconds.median("free") / lengths["free"],
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--random", choices=[*rwkv7.PRESETS], metavar="SIZE")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    with model_or_random(given.model, given.random) as path:
        llm = LLM(path, threads=given.threads)
        model = {"model": model_name(given.model, given.random)}
        report(
            "grammar",
            [model | row for row in measure(given, llm)],
            Machine(threads=llm.runner.threads),
            save=given.save,
        )


if __name__ == "__main__":
    main()
