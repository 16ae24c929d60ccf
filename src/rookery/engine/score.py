"""What a model thinks of given texts: how likely they are, and a vector for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from rookery.engine.runners.protocol import RowState, Wanted
from rookery.engine.sampling import log_softmax
from rookery.engine.session import END_OF_TEXT

if TYPE_CHECKING:
    from rookery.engine.llm import LLM

BUDGET = 256
"""Tokens of one call: their logits are 64 MB for 65,536 tokens."""


@dataclass(frozen=True)
class Score:
    """How likely a text is."""

    tokens: tuple[int, ...]
    """The text's tokens."""
    logprobs: np.ndarray
    """float32 [tokens]: the logarithm of each one's probability, given those before it."""

    @property
    def logprob(self) -> float:
        """The logarithm of the text's probability."""
        return float(self.logprobs.sum(dtype=np.float64))

    @property
    def perplexity(self) -> float:
        """exp of the mean loss per token; 1 for an empty text."""
        return float(np.exp(-self.logprob / max(1, len(self.tokens))))


def score(llm: LLM, texts: Sequence[str | Sequence[int]], bos: bool = True) -> list[Score]:
    """A `Score` for each text.

    With `bos` token 0 stands before the text, as in training; without, the first token is certain.
    """
    ids = [llm.tokens_of(text) for text in texts]
    found = [np.zeros(len(tokens), np.float32) for tokens in ids]
    start = [END_OF_TEXT] if bos else []
    # the last token predicts nothing that is asked for
    rows = [(start + tokens)[:-1] for tokens in ids]

    def told(row: int, place: int, logits: np.ndarray) -> None:
        first = place + 1 - len(start)  # the token that these logits predict first
        targets = ids[row][first : first + len(logits)]
        found[row][first : first + len(logits)] = log_softmax(logits)[np.arange(len(targets)), targets]

    _read_all(llm, rows, "all", told)
    return [Score(tuple(tokens), values) for tokens, values in zip(ids, found)]


def embed(llm: LLM, texts: Sequence[str | Sequence[int]], bos: bool = True) -> np.ndarray:
    """float32 [texts, hidden_size], each of length 1: what the last token brings to the last block's channel mix.

    Models of several temporal perspectives keep one such vector for each; they stand one after the other.

    It is read off the state, so it costs no more than reading the text. Models of this library are not trained for
    similarity: compare such vectors with each other, of one model only. ValueError for a model without token shift.
    """
    rows = [([END_OF_TEXT] if bos else []) + llm.tokens_of(text) for text in texts]
    _vector_name(llm)
    return vectors(llm, _read_all(llm, rows, "none", lambda *_: None))


def vectors(llm: LLM, states: Sequence[RowState]) -> np.ndarray:
    """float32 [states, hidden_size]: what `embed` reads off states that stand at the ends of texts."""
    name = _vector_name(llm)
    found = np.zeros((len(states), llm.fresh_state().tensors()[name].size), np.float32)
    for row, state in enumerate(states):
        found[row] = state.tensors()[name][0].astype(np.float32).ravel()
    return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12)


def _vector_name(llm: LLM) -> str:
    names = [name for name in llm.fresh_state().tensors() if name.endswith(".ffn_shift")]
    if not names:
        raise ValueError(
            f"a model of the family {llm.runner.family} keeps no vector of its last token; embed needs one that mixes "
            "the token before it into the channel mix, as RWKV does"
        )
    return max(names, key=lambda name: int(name.split(".")[1]))


def _read_all(
    llm: LLM, rows: Sequence[Sequence[int]], wanted: Wanted, told: Callable[[int, int, np.ndarray], None]
) -> list[RowState]:
    """Reads every row from the start, many side by side; `told` gets row, place and logits. Returns their states."""
    states = [llm.fresh_state() for _ in rows]
    places = [0] * len(rows)
    open_rows = [row for row in range(len(rows)) if len(rows[row])]
    while open_rows:
        batch, pieces, budget = [], [], BUDGET
        for row in open_rows:
            piece = rows[row][places[row] : places[row] + budget]
            batch.append(row)
            pieces.append(piece)
            budget -= len(piece)
            if not budget:
                break
        logits = llm.runner.forward_rows(pieces, [states[row] for row in batch], [wanted] * len(batch))
        for row, piece, given in zip(batch, pieces, logits):
            told(row, places[row], given)
            places[row] += len(piece)
        open_rows = [row for row in open_rows if places[row] < len(rows[row])]
    return states
