"""What guessing tokens ahead gains: the same text with and without, in turns.

    python benchmarks/speculate.py [--model FILE] [--draft FILE] [--tokens 128] [--guess 4 8] [--save]

On text that repeats itself (a list, a quotation) and on free text. Texts must be equal token for token. Beside it the
time of a call by the number of its tokens, which bounds the gain. Without --model it is the embedded one.
"""

import argparse
from collections.abc import Callable
from typing import Any

from support import Machine, interleaved, report

from rookery import LLM
from rookery.engine.speculate import DraftModel

PROMPTS = {
    "repetitive": "Tom likes the big red ball. Sue likes the big red ball. Max likes the big red ball. " * 4,
    "free": "Once upon a time, in a land far away, there lived",
}


def writer(llm: LLM, prompt: str, tokens: int, temperature: float, speculate: Any, told: dict) -> Callable[[], None]:
    start = llm.session()
    start.feed(prompt)

    def run() -> None:
        session = start.fork()
        stream = session.stream_tokens(tokens, temperature, seed=1, ignore_eos=True, speculate=speculate)
        told["tokens"] = list(stream)
        told["guessed"], told["right"] = stream.guessed

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--draft")
    parser.add_argument("--quantize")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--guess", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    llm = LLM(given.model, quantize=given.quantize, threads=given.threads)
    ways: dict[str, Any] = {f"lookup {n}": n for n in given.guess}
    if given.draft:
        draft = LLM(given.draft, threads=given.threads)
        ways |= {f"draft {n}": DraftModel(draft, n) for n in given.guess}
    rows = []
    for kind, prompt in PROMPTS.items():
        for temperature in given.temperature:
            told: dict[str, dict] = {name: {} for name in ("plain", *ways)}
            calls = {name: writer(llm, prompt, given.tokens, temperature, ways.get(name), told[name]) for name in told}
            seconds = interleaved(calls, rounds=given.rounds)
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
    rows += costs(llm, given.rounds)
    report("speculate", rows, Machine(threads=llm.runner.threads), save=given.save)


def costs(llm: LLM, rounds: int) -> list[dict[str, Any]]:
    """Time of reading so many tokens in one call, logits of all of them included, against one token."""
    calls = {}
    for count in (1, 2, 3, 5, 9, 17):
        state = llm.fresh_state()
        calls[str(count)] = lambda count=count, state=state: [
            llm.runner.forward([1] * count, state, "all") for _ in range(4)
        ]
    seconds = interleaved(calls, rounds=rounds)
    return [{"tokens of a call": int(n), "times one token's": 1 / seconds.ratio("1", n)} for n in calls]


if __name__ == "__main__":
    main()
