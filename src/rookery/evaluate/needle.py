"""Passkey retrieval (arXiv 2305.16300): a number is told once in a long text that repeats itself; is it still known?"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from rookery.evaluate.scoring import Request, Scorer
from rookery.tokenizers.base import Tokenizer

OPENING = "There is an important number hidden in a lot of other text. Find it and remember it.\n"
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key.\n"
QUESTION = "What is the pass key? The pass key is"


def passkey(
    scorer: Scorer,
    tokenizer: Tokenizer,
    *,
    lengths: Sequence[int] = (512, 1024, 2048, 4096),
    depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    trials: int = 5,
    seed: int = 0,
) -> dict[str, Any]:
    """Share of keys that the model would say by always taking the likeliest token, by length and depth.

    A text has about `lengths` tokens; the key stands after the share `depths` of it. What texts of a length begin with
    is read once for all trials. "table" has a row for every length and depth.
    """
    draw = random.Random(seed)
    cells = [(length, depth) for length in lengths for depth in depths]
    rows = []
    for length in lengths:
        keys = {depth: [draw.randint(10000, 99999) for _ in range(trials)] for depth in depths}
        requests = [passkey_request(tokenizer, length, depth, key) for depth in depths for key in keys[depth]]
        right = iter([score.is_greedy for score in scorer.score(requests)])
        for depth in depths:
            found = sum(next(right) for _ in range(trials))
            rows.append({"length": length, "depth": depth, "accuracy": found / trials})
    assert len(rows) == len(cells)
    return {
        "accuracy": sum(row["accuracy"] for row in rows) / len(rows),
        "questions": len(rows) * trials,
        "table": rows,
    }


def passkey_request(tokenizer: Tokenizer, length: int, depth: float, key: int) -> Request:
    """One text and the key. ValueError where `length` has no room for the needle and the question."""
    opening, filler = tokenizer.encode(OPENING), tokenizer.encode(FILLER)
    needle, question = tokenizer.encode(NEEDLE.format(key=key)), tokenizer.encode(QUESTION)
    room = length - 1 - len(opening) - len(needle) - len(question)
    if room < 0:
        raise ValueError(f"a text of {length} tokens has no room for the needle; give at least {length - room}")
    times = room // len(filler)
    before = round(times * depth)
    text = [tokenizer.eos_id, *opening, *filler * before, *needle, *filler * (times - before), *question]
    return Request(text, tokenizer.encode(f" {key}"))
