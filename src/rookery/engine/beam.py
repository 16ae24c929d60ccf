"""Beam search: the likeliest texts that can be found by always keeping the best few beginnings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from rookery.engine.position import Position
from rookery.engine.sampling import log_softmax
from rookery.engine.session import Session

if TYPE_CHECKING:
    from rookery.engine.llm import LLM


@dataclass(frozen=True)
class Beam:
    """One text."""

    tokens: tuple[int, ...]
    """Without the one that ended it."""
    logprob: float
    """The logarithm of its probability, that of its end included."""
    ended: bool
    """False where it was cut off at the largest length."""


def beam_search(
    llm: LLM,
    prompt: str | Sequence[int],
    beams: int = 4,
    max_tokens: int = 64,
    *,
    length_penalty: float = 0.0,
    session: Session | None = None,
) -> list[Beam]:
    """The best `beams` texts that follow `prompt`, the best first.

    A text's score is its log probability divided by (its tokens) ** `length_penalty`: 0 prefers short texts, 1 compares
    the mean. Rows of the batch that are given up make room for copies of better ones (`Runner.select`). `session` is
    where the prompt goes on from; it stays as it is.
    """
    if beams < 1 or max_tokens < 1:
        raise ValueError(f"beams and max_tokens must be 1 or more, got {beams} and {max_tokens}")
    at = _begin(llm, prompt, session)

    def score(logprob: float, length: int) -> float:
        return logprob / max(1, length) ** length_penalty

    states, texts, totals = [at.state], [()], np.zeros(1)
    logprobs, done, end = log_softmax(at.logits[None]), [], llm.end_of_text
    for length in range(1, max_tokens + 1):
        parents, tokens, values = _best(totals[:, None] + logprobs, 2 * beams)
        going = [i for i in range(len(tokens)) if tokens[i] != end][:beams]
        for i in range(len(tokens)):
            # an end counts only among the best, or short texts would win by being many
            if tokens[i] == end and i < beams:
                done.append((score(values[i], length), Beam(texts[parents[i]], float(values[i]), True)))
        texts = [(*texts[parents[i]], int(tokens[i])) for i in going]
        totals = values[going]
        done = sorted(done, key=lambda pair: -pair[0])[:beams]
        hopeless = length_penalty <= 0 and len(done) == beams and len(going) and totals.max() <= done[-1][0]
        if not going or hopeless or length == max_tokens:
            break
        states = llm.runner.select(states, [int(parents[i]) for i in going])
        rows = llm.runner.forward_rows([text[-1:] for text in texts], states, ["last"] * len(states))
        logprobs = log_softmax(np.concatenate(rows))
    done += [(score(total, len(text)), Beam(text, float(total), False)) for text, total in zip(texts, totals)]
    return [beam for _, beam in sorted(done, key=lambda pair: -pair[0])[:beams]]


def _begin(llm: LLM, prompt: str | Sequence[int], session: Session | None) -> Position:
    start = Session(llm) if session is None else session.fork()
    start.feed(prompt)
    if start._at.logits is None:
        raise ValueError("there is nothing to go on from: give a prompt, or token 0 for a text from nowhere")
    return start._at


def _best(values: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows, columns and values of the largest finite ones, falling; among equals the first."""
    flat = values.ravel()
    count = min(count, len(flat))
    places = np.argpartition(-flat, count - 1)[:count]
    places = places[np.lexsort((places, -flat[places]))]
    places = places[np.isfinite(flat[places])]
    return *np.unravel_index(places, values.shape), flat[places]
