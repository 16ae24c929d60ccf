"""A text as it is made: what was asked for, and the tokens or the pieces of text one after the other."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from rookery.engine.position import Position
from rookery.engine.sampling import Sampler, Sampling, TokenLogprobs, logprobs_of
from rookery.engine.text import StopStrings

if TYPE_CHECKING:
    from rookery.engine.grammar import Grammar
    from rookery.engine.llm import LLM
    from rookery.engine.session import Session
    from rookery.engine.speculate import Drafts, Verifier


@dataclass(frozen=True, kw_only=True)
class Order:
    """What was asked for: how a text goes on and where it ends."""

    max_tokens: int
    sampling: Sampling
    seed: int
    ends: frozenset[int]
    """Tokens that end the text."""
    stop: tuple[str, ...] | None = None
    """Strings that end the text; None for a stream of token ids, which needs no tokenizer."""
    grammar: Grammar | None = None
    """What the text must look like."""
    logprobs: int | None = None
    """How many of the likeliest tokens are told for every token; None tells nothing."""
    speculate: Drafts | None = None
    """Guesses what comes; changes nothing but the time it takes."""

    @classmethod
    def of(
        cls,
        llm: LLM,
        max_tokens: int = 256,
        temperature: float = 1.0,
        seed: int | None = None,
        ignore_eos: bool = False,
        *,
        stop: tuple[str, ...] | None = None,
        grammar: Grammar | None = None,
        logprobs: int | None = None,
        speculate: Drafts | int | None = None,
        **sampling: Any,
    ) -> Self:
        """The options of `Session.stream`, checked; a seed is chosen where none is given."""
        for name, value in (("max_tokens", max_tokens), ("logprobs", logprobs)):
            if value is not None and value < 0:
                raise ValueError(f"{name} must be 0 or more, got {value}")
        how = Sampling(temperature=temperature, **sampling)
        llm.tokens_of([*how.banned, *how.logit_bias])
        if grammar is not None:
            llm.guide.check(grammar)
        if isinstance(speculate, int):
            from rookery.engine.speculate import Lookup

            speculate = Lookup(speculate) if speculate else None
        StopStrings(stop or ())
        return cls(
            max_tokens=max_tokens,
            sampling=how,
            seed=int.from_bytes(os.urandom(8), "little") if seed is None else seed,
            ends=frozenset() if ignore_eos else frozenset({llm.end_of_text}),
            stop=stop,
            grammar=grammar,
            logprobs=logprobs,
            speculate=speculate,
        )


class TokenStream:
    """Tokens one after the other, as they are sampled."""

    def __init__(self, session: Session, order: Order) -> None:
        self.session, self.order = session, order
        self.seed = order.seed
        """Gives the same tokens again from the same position."""
        self.tokens: list[int] = []
        """The tokens so far, without the one that ended the text."""
        self._finish_reason: str | None = None
        self.logprobs: list[TokenLogprobs] = []
        """Of every token, if `logprobs` was asked for."""
        at, llm = session._at, session.llm
        pieces = llm.tokenizer.token_bytes if order.sampling.penalises else None
        constraint = None if order.grammar is None else llm.guide.start(order.grammar)
        step = at.state.tokens_seen + len(at.unread)
        self._sampler = Sampler(order.sampling, order.seed, pieces, step=step, constraint=constraint)
        self._verifier: Verifier | None = None
        if order.speculate is not None:
            from rookery.engine.speculate import Verifier

            self._verifier = Verifier(session, order)

    @property
    def finish_reason(self) -> str | None:
        """None while open, then "length", "end" (token 0), "stop" (a stop string) or "closed"."""
        return self._finish_reason

    def finish(self, reason: str) -> None:
        """Ends the stream."""
        self._finish_reason = reason
        # session and stream must not keep each other: their states would wait for the garbage collector
        self.session._stream = None

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> int:
        if (token := self.advance()) is None:
            raise StopIteration
        return token

    @property
    def full(self) -> bool:
        """True if no token may come any more: the next step ends the stream without the model."""
        return self.finish_reason is None and (self._sampler.complete or len(self.tokens) >= self.order.max_tokens)

    @property
    def guessed(self) -> tuple[int, int]:
        """Tokens that were guessed, and how many of them came."""
        return (0, 0) if self._verifier is None else (self._verifier.guessed, self._verifier.right)

    def advance(self) -> int | None:
        """The next token; None at the end."""
        if self.full:
            self.finish("end" if self._sampler.complete else "length")
        if self.finish_reason is not None:
            return None
        logits = self._logits()
        token = self._sampler.next(logits)
        if token in self.order.ends:
            self.finish("end")
            return None
        self._sampler.accept(token)
        if self.order.logprobs is not None:
            self.logprobs.append(logprobs_of(logits, token, self.order.logprobs))
        self.tokens.append(token)
        self.session._at.add([token])
        self.session.context.append(token)
        return token

    def _logits(self) -> np.ndarray:
        """What follows the text so far."""
        if self._verifier is not None:
            return self._verifier.logits(self.order.max_tokens - len(self.tokens))
        self.session._read(self.session._at)
        return self.session._at.logits

    def close(self) -> None:
        """Ends the stream; harmless when it has ended."""
        if self.finish_reason is None:
            self.finish("closed")

    def shown(self) -> Position:
        return self.session._at


class TextStream:
    """Pieces of text one after the other; the attributes are those of `TokenStream`."""

    def __init__(self, source: TokenStream, stops: StopStrings) -> None:
        self._source, self._stops = source, stops
        self.session = source.session
        self._tokenizer = self.session.llm.tokenizer
        self._decoder = self._tokenizer.stream()
        self._decoder.push(*self.session._at.recent)
        # where the session stood when all its text had been shown, and what was shown of the tokens since; None while
        # nothing is held back
        self._mark: Position | None = None
        self._since = ""

    @property
    def tokens(self) -> list[int]:
        """The tokens sampled so far; a stop string's are among them."""
        return self._source.tokens

    @property
    def seed(self) -> int:
        """Gives the same text again from the same position."""
        return self._source.seed

    @property
    def finish_reason(self) -> str | None:
        """None while open, then "length", "end" (token 0), "stop" (a stop string) or "closed"."""
        return self._source.finish_reason

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        while self.finish_reason is None:
            if piece := self.advance():
                return piece
        raise StopIteration

    def close(self) -> None:
        """Ends the stream where it is; the session forgets what was sampled and not shown."""
        if self.finish_reason is None:
            self._source.close()
            self._return_to_shown()

    def shown(self) -> Position:
        """Where the session stands with exactly the text that was shown."""
        if self._mark is None:
            return self.session._at
        at = self._mark.copy()
        at.add(self._tokenizer.encode(self._since))
        return at

    def unfinished(self) -> str:
        """U+FFFD where the text so far ends inside a character, which a later stream may finish; else nothing."""
        return self._decoder.copy().finish()

    @property
    def logprobs(self) -> list[TokenLogprobs]:
        """Of every token, if `logprobs` was asked for."""
        return self._source.logprobs

    @property
    def guessed(self) -> tuple[int, int]:
        """Tokens that were guessed, and how many of them came."""
        return self._source.guessed

    @property
    def full(self) -> bool:
        """True if no token may come any more: the next step ends the stream without the model."""
        return self._source.full

    def advance(self) -> str:
        """Samples one token; the text that may be shown now."""
        clean = not self._decoder.pending
        token = next(self._source, None)
        if token is None:
            self._mark = None  # what was held back belongs to the text after all
            return self._stops.flush()
        text, stopped = self._stops.push(self._decoder.push(token))
        if self._stops.stops:
            behind = stopped or self._stops.held or self._decoder.pending
            if behind and self._mark is None and clean:
                # the token is not in the state yet: this is the last moment to keep the state without it
                at = self.session._at
                self._mark, self._since = Position(at.state.copy(), at.logits, at.unread[:-1], at.recent[:-1]), ""
            self._since += text
            if not behind:
                self._mark = None
        if stopped:
            self._source.finish("stop")
            self._return_to_shown()
        return text

    def _return_to_shown(self) -> None:
        self.session._at = self.shown()
        self._mark = None
