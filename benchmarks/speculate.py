"""What guessing tokens ahead gains: the same text with and without, in turns.

    python benchmarks/speculate.py [--model FILE | --random 0.1b] [--draft FILE] [--tokens 128] [--guess 4 8] [--save]

On text that repeats itself and on free text, by lookup and by a draft model; and with guesses of which a given share is
right, which tells what a model of this size can gain on any text. Texts must be equal token for token. Beside it the
time of a call by the number of its tokens, which bounds the gain. Without --model it is the embedded one; --random
takes random weights of a published size.
"""

import argparse
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from decode import model_name, model_or_random
from support import Machine, interleaved, report

from rookery import LLM
from rookery.engine.session import Session
from rookery.engine.speculate import DraftModel
from rookery.engine.stream import Order
from rookery.families import rwkv7

PROMPTS = {
    # the embedded model goes on repeating this, where it takes the likeliest tokens
    "repetitive": " ".join(["The sun is up. The sky is blue. The bird sings. I love you."] * 6),
    "free": "Once upon a time, in a land far away, there lived",
}


class Told:
    """Guesses what was told to come; each guess is right with the probability `share`."""

    def __init__(self, future: Sequence[int], share: float, tokens: int) -> None:
        self.future, self.share, self.tokens = future, share, tokens

    def start(self, session: Session, order: Order) -> "Told":
        self.place, self.draw = 0, random.Random(1)
        return self

    def accept(self, tokens: Sequence[int]) -> None:
        self.place += len(tokens)

    def guess(self, count: int) -> list[int]:
        coming = self.future[self.place : self.place + count]
        return [token if self.draw.random() < self.share else 1 + (token == 1) for token in coming]


def writer(start: Session, tokens: int, temperature: float, speculate: Any, told: dict) -> Callable[[], None]:
    def run() -> None:
        stream = start.fork().stream_tokens(tokens, temperature, seed=1, ignore_eos=True, speculate=speculate)
        told["tokens"] = list(stream)
        told["guessed"], told["right"] = stream.guessed

    return run


def measure(given: argparse.Namespace, llm: LLM, kind: str, temperature: float) -> list[dict[str, Any]]:
    start, told = llm.session(), {"plain": {}}
    start.feed(PROMPTS[kind] if given.random is None else random_prompt(kind, llm))
    plain = writer(start, given.tokens, temperature, None, told["plain"])
    plain()
    ways: dict[str, Any] = {f"lookup {n}": n for n in given.guess}
    if given.draft:
        draft = LLM(given.draft, threads=given.threads)
        ways |= {f"draft {n}": DraftModel(draft, n) for n in given.guess}
    if kind == "free":
        shares, future = (1.0, 0.8, 0.6, 0.4), told["plain"]["tokens"]
        ways |= {f"{share:.0%} right, {n}": Told(future, share, n) for share in shares for n in given.guess}
    told |= {name: {} for name in ways}
    calls = {name: writer(start, given.tokens, temperature, way, told[name]) for name, way in ways.items()}
    seconds = interleaved({"plain": plain} | calls, rounds=given.rounds)
    rows = []
    for name in ways:
        assert told[name]["tokens"] == told["plain"]["tokens"], f"{name} changed the text"
        low, high = seconds.spread("plain", name)
        rows.append(
            {
                "text": kind,
                "temperature": temperature,
                "guesses": name,
                "tokens/s": given.tokens / seconds.median(name),
                "plain tokens/s": given.tokens / seconds.median("plain"),
                "times faster": seconds.ratio("plain", name),
                "spread": f"{low:.2f}-{high:.2f}",
                "guessed": told[name]["guessed"],
                "right": told[name]["right"],
            }
        )
    return rows


def random_prompt(kind: str, llm: LLM) -> list[int]:
    ids = np.random.default_rng(1).integers(1, llm.runner.config.vocab_size, size=24).tolist()
    return ids if kind == "free" else ids * 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--random", choices=[*rwkv7.PRESETS], metavar="SIZE")
    parser.add_argument("--draft")
    parser.add_argument("--quantize")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--guess", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    with model_or_random(given.model, given.random) as path:
        llm = LLM(path, quantize=given.quantize, threads=given.threads)
        rows = [row for kind in PROMPTS for t in given.temperature for row in measure(given, llm, kind, t)]
        rows += costs(llm, given.rounds)
    model = {"model": model_name(given.model, given.random, given.quantize)}
    rows = [model | row for row in rows]
    report("speculate", rows, Machine(threads=llm.runner.threads), save=given.save)


def costs(llm: LLM, rounds: int) -> list[dict[str, Any]]:
    """Time of reading so many tokens in one call, with logits and states of all of them, against one token."""
    calls = {}
    state = llm.fresh_state()
    for count in (1, 2, 3, 5, 9, 17):
        calls[str(count)] = lambda count=count: [
            llm.runner.forward_steps([1] * count, state, count - 1) for _ in range(4)
        ]
    seconds = interleaved(calls, rounds=rounds)
    return [{"tokens of a call": int(n), "times one token's": 1 / seconds.ratio("1", n)} for n in calls]


if __name__ == "__main__":
    main()
