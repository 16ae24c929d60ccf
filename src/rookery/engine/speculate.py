"""Guesses of the tokens that come, checked in one call: weights are read once for all of them.

The text is the same as without guesses, token for token: every token is sampled from the model's own logits with the
number that belongs to its place, and a guess counts where it is that very token. (Rejection sampling, arXiv 2211.17192,
keeps the distribution alone.) A recurrent state cannot forget tokens, so the compiled runtime gives the state before
every guess. Where there is none (torch), the state before the first guess stays until all of them have come; after a
wrong one the tokens that came are read again together with the next guesses.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from rookery.engine.sampling import Sampler

if TYPE_CHECKING:
    from rookery.engine.llm import LLM
    from rookery.engine.position import Position
    from rookery.engine.runners.protocol import RowState
    from rookery.engine.session import Session
    from rookery.engine.stream import Order

REREAD = 8
"""As many tokens that came are read again with the next guesses; more are read once and for all."""


class Source(Protocol):
    """Guesses for one stream."""

    def accept(self, tokens: Sequence[int]) -> None:
        """The text goes on with these tokens."""

    def guess(self, count: int) -> list[int]:
        """At most `count` tokens that may come next."""


class Drafts(Protocol):
    """Where guesses come from."""

    tokens: int
    """At most so many are guessed at a time."""

    def start(self, session: Session, order: Order) -> Source:
        """Guesses for a stream that begins where `session` stands."""


class Lookup:
    """What followed when the same `shortest` tokens last stood in the text: good for code, lists and quotes."""

    def __init__(self, tokens: int = 8, shortest: int = 3) -> None:
        if tokens < 1 or shortest < 1:
            raise ValueError(f"tokens and shortest must be 1 or more, got {tokens} and {shortest}")
        self.tokens, self.shortest = tokens, shortest

    def start(self, session: Session, order: Order) -> Source:
        return _Looked(self.shortest, session.context)


class _Looked:
    def __init__(self, length: int, context: Sequence[int]) -> None:
        self._length = length
        self._text: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # the last tokens -> where the text went on after them
        self._found: int | None = None
        self.accept(context)

    def accept(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            self._text.append(token)
            if len(self._text) >= self._length:
                key = tuple(self._text[-self._length :])
                self._found = self._after.get(key)
                self._after[key] = len(self._text)

    def guess(self, count: int) -> list[int]:
        if self._found is None:
            return []
        ahead = self._text[self._found : self._found + count]
        # a text that repeats itself goes on repeating itself
        period = len(ahead)
        return [ahead[i % period] for i in range(count)] if period else []


class DraftModel:
    """A smaller model with the same tokenizer."""

    def __init__(self, llm: LLM, tokens: int = 4) -> None:
        if tokens < 1:
            raise ValueError(f"tokens must be 1 or more, got {tokens}")
        self.llm, self.tokens = llm, tokens

    def start(self, session: Session, order: Order) -> Source:
        ours, theirs = self.llm.runner.config.vocab_size, session.llm.runner.config.vocab_size
        if ours != theirs:
            raise ValueError(
                f"the draft model knows {ours} tokens, the model {theirs}; a draft model must have the same tokenizer"
            )
        return _Drafted(self.llm, session, order)


class _Drafted:
    def __init__(self, llm: LLM, session: Session, order: Order) -> None:
        self._runner, self._order = llm.runner, order
        self._state = llm.fresh_state()
        self._unread = list(session.context)
        at = session._at
        self._step = at.state.tokens_seen + len(at.unread)

    def accept(self, tokens: Sequence[int]) -> None:
        self._unread += tokens
        self._step += len(tokens)

    def guess(self, count: int) -> list[int]:
        if not self._unread:
            return []
        logits = self._runner.forward(self._unread, self._state)[-1]
        self._unread = []
        # the number that the model's own token will be drawn with: two models of one mind then draw the same token
        sampler = Sampler(self._order.sampling, self._order.seed, step=self._step)
        guessed: list[int] = []
        state = self._state.copy()
        while True:
            guessed.append(sampler.next(logits))
            if len(guessed) == count:
                return guessed
            logits = self._runner.forward(guessed[-1:], state)[-1]


class Verifier:
    """Gives a stream its logits, one place after the other, and reads several places at a time where it can."""

    def __init__(self, session: Session, order: Order) -> None:
        self._session = session
        self._most = order.speculate.tokens
        self._source = order.speculate.start(session, order)
        self._count = min(2, self._most)
        self._steps = getattr(session.llm.runner, "forward_steps", None)
        # a guess, the logits that follow it, and the state after it where that is known
        self._guesses: deque[tuple[int, np.ndarray, RowState | None]] = deque()
        self.guessed = self.right = 0
        """Tokens that were guessed, and how many of them came."""

    def logits(self, wanted: int) -> np.ndarray:
        """What follows the text so far, of which at most `wanted` more tokens will be asked for."""
        at = self._session._at
        if self._guesses:
            guess, row, state = self._guesses.popleft()
            if at.unread and at.unread[-1] == guess:
                self._source.accept([guess])
                self.right += 1
                if not self._guesses:
                    self._count = min(2 * self._count, self._most)
                if state is not None:
                    at.state, at.logits, at.unread = state, row, ()
                return row
            self._count = max(1, self._count // 2)
            self._guesses.clear()
        if not at.unread:
            return at.logits  # of the prompt
        self._source.accept(at.unread[-1:])
        count = 0 if len(at.unread) > REREAD else min(self._count, wanted - 1)
        guesses = self._source.guess(count) if count > 0 else []
        if not guesses:
            self._session._read(at)
            return at.logits
        return self._check(at, guesses)

    def _check(self, at: Position, guesses: list[int]) -> np.ndarray:
        """Reads what is unread and the guesses; what follows the former."""
        self.guessed += len(guesses)
        tokens = [*at.unread, *guesses]
        if self._steps is not None:
            rows, states = self._steps(tokens, at.state, len(guesses))
            at.state, at.logits, at.unread = states[0], rows[0], ()
            self._guesses.extend(zip(guesses, rows[1:], states[1:]))
        else:
            ahead = at.state.copy()
            rows = self._session.llm.runner.forward(tokens, ahead, len(guesses) + 1)
            self._guesses.extend(zip(guesses, rows[1:], [*[None] * (len(guesses) - 1), ahead]))
        return rows[0]
