"""A conversation: a model's state, what it would say next, and the rules for going on.

What a session knows is the text it was fed and the text it has shown. `tokens_seen` counts every token whose effect is
in the state: those fed and those sampled, but neither the token that ended a text (id 0) nor a stop string. A sampled
token is read by the model when the session is next used, so that the last one of a text costs nothing until then; every
public method counts it as read.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from rookery.checkpoints.state_file import SESSION_PREFIX, read_state, write_state
from rookery.checkpoints.tuned_state import start_arrays
from rookery.engine.runners.protocol import RowState, Runner
from rookery.engine.sampling import Sampler, Sampling, TokenLogprobs, logprobs_of
from rookery.engine.text import StopStrings
from rookery.errors import BadState

if TYPE_CHECKING:
    from rookery.engine.grammar import Grammar
    from rookery.engine.llm import LLM
    from rookery.engine.speculate import Drafts, Verifier

END_OF_TEXT = 0
"""The token that ends a text in every RWKV vocabulary."""
CHUNK = 512
"""Tokens of a prompt that are read in one call: bounds memory, and lets an interruption through."""
KEPT = 64
"""Snapshots that a session keeps at most: memory must not grow with a conversation."""
CONTEXT = 2048
"""Tokens of a session that are remembered as such."""
RECENT = 8
"""Tokens that a decoder needs to go on; a character has at most four bytes, and few tokens have none."""


@dataclass
class Position:
    """Where a session stands."""

    state: RowState
    """What the model remembers; advanced in place."""
    logits: np.ndarray | None = None
    """float32 [vocab], what follows the last token of `state`; None where nothing was read, or its logits are lost."""
    unread: tuple[int, ...] = ()
    """Tokens that belong to the text and are not in `state` yet."""
    recent: tuple[int, ...] = ()
    """The last tokens of the text: enough for a decoder to go on in the middle of a character or a word."""

    def add(self, tokens: Sequence[int]) -> None:
        """Lengthens the text."""
        self.unread += tuple(tokens)
        self.recent = (self.recent + tuple(tokens))[-RECENT:]

    def copy(self) -> Position:
        """An independent copy; logits are never written to and may be shared."""
        return replace(self, state=self.state.copy())


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


class Session:
    """One conversation with a model; made by `LLM.session()`."""

    def __init__(self, llm: LLM, position: Position | None = None) -> None:
        self.llm = llm
        self._at = position or Position(llm.fresh_state())
        self._stream: TextStream | TokenStream | None = None
        self._kept: dict[int, Position] = {}
        self.context: deque[int] = deque(self._at.recent, CONTEXT)
        """The last tokens that were fed: what speculation guesses from."""

    @property
    def tokens_seen(self) -> int:
        """Tokens whose effect is in the state."""
        self._read(self._at)
        return self._at.state.tokens_seen

    @property
    def nbytes(self) -> int:
        """Bytes of the state."""
        return self._at.state.nbytes

    def feed(self, text_or_ids: str | Sequence[int]) -> None:
        """Reads text, or token ids; the state is up to date on return. Ends a stream that is still open."""
        tokens = self.llm.tokens_of(text_or_ids)
        self._end_stream()
        self._at.add(tokens)
        self.context.extend(tokens)
        self._read(self._at)

    def stream(
        self,
        max_tokens: int = 256,
        temperature: float = 1.0,
        seed: int | None = None,
        ignore_eos: bool = False,
        *,
        stop: str | Sequence[str] = (),
        **sampling: Any,
    ) -> TextStream:
        """Goes on with the text: an iterator over its pieces, each made of whole characters.

        It ends after `max_tokens`, at token 0 (unless `ignore_eos`), or before the first of the strings `stop`,
        wherever token borders lie. `sampling` takes the other fields of `Sampling` (top_p, top_k, …), and `grammar` (a
        form that the text must have, from `rookery.engine.grammar`), `logprobs` (how many of the likeliest tokens the
        stream tells for every token) and `speculate` (how many tokens may be guessed from what was said before, or a
        `DraftModel` that guesses: the same text in less time). The same `seed` at the same position draws the same
        numbers, so a text cut into several calls, or saved and loaded, goes on as if it had not been; None draws anew.
        ValueError where there is nothing to go on from.
        """
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        return self.open(Order.of(self.llm, max_tokens, temperature, seed, ignore_eos, stop=stops, **sampling))

    def stream_tokens(
        self,
        max_tokens: int = 256,
        temperature: float = 1.0,
        seed: int | None = None,
        ignore_eos: bool = False,
        **sampling: Any,
    ) -> TokenStream:
        """As `stream`, but over token ids: needs no tokenizer and knows no stop strings."""
        return self.open(Order.of(self.llm, max_tokens, temperature, seed, ignore_eos, **sampling))

    def generate(self, max_tokens: int = 256, **options: Any) -> str:
        """The pieces of `stream` in one string; the options are the same."""
        return "".join(self.stream(max_tokens, **options))

    def say(self, text: str, max_tokens: int = 1024, **options: Any) -> str:
        """What the model answers; the options are those of `reply`. For models that were trained to converse."""
        return "".join(self.reply(text, max_tokens, **options)).strip()

    def reply(
        self,
        text: str,
        max_tokens: int = 1024,
        *,
        system: str | None = None,
        think: str | bool | None = None,
        **options: Any,
    ) -> TextStream:
        """The model's answer to a user's turn, as a stream; it begins with the space after "Assistant:".

        `system` says how to behave, before the turn; `think` is one of the template's ways to think. The other options
        are those of `stream`; the template's stop strings are added to `stop`. ValueError for a model without a chat
        template.
        """
        from rookery.tokenizers.chat import END_OF_TURN, render

        template = self.llm.template
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": text})
        stop = options.pop("stop", ())
        stops = (*((stop,) if isinstance(stop, str) else stop), *template.stops)
        if self.tokens_seen:
            prompt = END_OF_TURN + render(messages, replace(template, opening=()), think)
        else:
            prompt = render(messages, template, think)
        self.feed(prompt)
        return self.stream(max_tokens, stop=stops, **options)

    def fork(self) -> Session:
        """An independent session that stands where this one does, with the same snapshots to rewind to."""
        branch = Session(self.llm, self._shown().copy())
        branch._kept, branch.context = dict(self._kept), self.context.copy()
        return branch

    def keep(self) -> int:
        """Keeps a snapshot to `rewind` to; its name is the number of tokens in it. Of more than 64 the oldest goes."""
        at = self._shown()
        self._read(at)
        self._kept[at.state.tokens_seen] = at.copy()
        if len(self._kept) > KEPT:
            del self._kept[min(self._kept)]
        return at.state.tokens_seen

    @property
    def kept(self) -> list[int]:
        """The snapshots that there are, by their tokens, rising."""
        return sorted(self._kept)

    def rewind(self, tokens_seen: int | None = None) -> int:
        """Goes back to the snapshot of so many tokens, or the last one; forgets what came after it, later ones too.

        An open stream ends. Returns the tokens that are left. BadState where no such snapshot is kept.
        """
        wanted = max(self._kept, default=None) if tokens_seen is None else tokens_seen
        if wanted not in self._kept:
            there = ", ".join(map(str, self.kept)) or "none; `keep` makes one"
            raise BadState(f"no snapshot after {tokens_seen} tokens is kept; there are: {there}")
        self._end_stream()
        self._at = self._kept[wanted].copy()
        self._kept = {length: at for length, at in self._kept.items() if length <= wanted}
        return wanted

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes everything the session needs to go on exactly; `LLM.session(state=path)` reads it.

        Beside the state the file holds the logits that follow it, so that going on reads no token twice.
        """
        at = self._shown()
        self._read(at)
        write_position(path, at, self.llm.runner)

    @classmethod
    def load(cls, llm: LLM, path: str | os.PathLike[str]) -> Self:
        """The session that `save` wrote to a file, or one on the bare or tuned state in it; BadState for another's."""
        runner = llm.runner
        arrays = start_arrays(
            path,
            lambda: runner.init_state().tensors(),
            family=runner.family,
            config=runner.config,
            model=runner.fingerprint(),
        )
        return cls(llm, position_of(arrays, runner)[0])

    def open(self, order: Order) -> TextStream | TokenStream:
        """The stream that `order` asks for; over token ids where its `stop` is None. Nothing is read or sampled yet."""
        self._end_stream()
        if self._at.logits is None and not self._at.unread:
            raise ValueError(
                "there is nothing to go on from: feed a prompt first, or token 0 (bos=True, --bos) for a text from "
                "nowhere"
            )
        tokens = TokenStream(self, order)
        self._stream = tokens if order.stop is None else TextStream(tokens, StopStrings(order.stop))
        return self._stream

    def _end_stream(self) -> None:
        """Ends an open stream; what it sampled and did not show is taken back."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _shown(self) -> Position:
        """Where the session stands with what was shown, which an open stream may be ahead of."""
        return self._at if self._stream is None else self._stream.shown()

    def _read(self, at: Position) -> None:
        """Brings the state and the logits up to the end of the text."""
        tokens, at.unread = at.unread, ()
        if not tokens:
            return
        at.logits = None  # an interruption must not leave those of an earlier token
        for start in range(0, len(tokens), CHUNK):
            chunk = tokens[start : start + CHUNK]
            wanted = "last" if start + CHUNK >= len(tokens) else "none"
            logits = self.llm.runner.forward(chunk, at.state, wanted)
        at.logits = logits[-1]


def write_position(
    path: str | os.PathLike[str], at: Position, runner: Runner, extra: Mapping[str, np.ndarray] | None = None
) -> None:
    """Writes a session's file; `extra` are more arrays to keep beside the state. Nothing of `at` may be unread."""
    kept = {"recent": np.array(at.recent, np.int64)} | dict(extra or {})
    if at.logits is not None:
        kept["logits"] = at.logits[None]
    tensors = at.state.tensors() | {SESSION_PREFIX + name: array for name, array in kept.items()}
    write_state(path, tensors, model=runner.fingerprint())


def read_position(path: str | os.PathLike[str], runner: Runner) -> tuple[Position, dict[str, np.ndarray]]:
    """What `write_position` wrote, and the arrays beside it by name; BadState where it is damaged or another's."""
    return position_of(read_state(path, model=runner.fingerprint()), runner)


def position_of(arrays: dict[str, np.ndarray], runner: Runner) -> tuple[Position, dict[str, np.ndarray]]:
    """A session's place from the arrays of its file, and those that are kept beside the state."""
    extra = {n.removeprefix(SESSION_PREFIX): arrays.pop(n) for n in list(arrays) if n.startswith(SESSION_PREFIX)}
    logits, recent = extra.get("logits"), extra.get("recent", np.empty(0, np.int64))
    state = runner.init_state(arrays)
    return Position(state, None if logits is None else logits[0], recent=tuple(recent.tolist())), extra


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
