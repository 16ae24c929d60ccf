"""Many texts at once: continuous batching, with pieces of prompts read beside the texts that go on.

A tick is one call of the runner: one token of every text that is being written, and at most `prefill` tokens of
prompts, so that a long prompt delays the others by a bounded time. Rows join and leave between ticks. Every row is a
`Session` with its own state and its own random stream, so its tokens are those that it would have alone.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from rookery.engine.position import RECENT, Position
from rookery.engine.runners.protocol import base_of
from rookery.engine.session import Session
from rookery.engine.state_cache import StateCache, common, cuts_of
from rookery.engine.stream import Order, TextStream, TokenStream

if TYPE_CHECKING:
    from rookery.engine.llm import LLM
    from rookery.engine.sampling import TokenLogprobs

log = logging.getLogger("rookery")

LOOK_AHEAD = 32
"""Waiting prompts that a prompt is compared with, to keep the state at the end of what they share."""
WORTH_WAITING = 16
"""Tokens that two prompts must share for the second to wait for the first one's state."""
_END = object()


class Generation:
    """One request: an iterator over its pieces of text (or token ids), and what is known about it.

    Iterating blocks until the next piece is there. Where no thread runs the scheduler, it runs it.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        llm: LLM,
        prompt: list[int],
        order: Order,
        session: Session | None,
        cache: StateCache | None,
        notify: Callable | None,
        watch: Callable | None,
    ) -> None:
        self.llm, self.order, self.prompt, self.cache = llm, order, prompt, cache
        self.session = session
        """Stands at the end of the text when all is done, to be saved, forked or continued; None before it is begun."""
        self.cached = 0
        """Tokens of the prompt that did not have to be read."""
        self.error: Exception | None = None
        self._scheduler, self._notify, self._watch = scheduler, notify, watch
        self._fresh = session is None
        self._pieces: SimpleQueue = SimpleQueue()
        self._stream: TextStream | TokenStream | None = None
        self._cuts: list[int] = []  # places of the prompt where reading pauses; the last is its end
        self._read = 0
        self._closed = False
        self._over = threading.Event()

    @property
    def read(self) -> int:
        """Tokens of the prompt that are read."""
        return self._read

    @property
    def tokens(self) -> list[int]:
        """The tokens so far, without the one that ended the text."""
        return self._stream.tokens if self._stream else []

    @property
    def logprobs(self) -> list[TokenLogprobs]:
        """Of every token, if `logprobs` was asked for."""
        return self._stream.logprobs if self._stream else []

    @property
    def finish_reason(self) -> str | None:
        """None while open, then "length", "end" (token 0), "stop" (a stop string), "closed" or "error"."""
        if self.error is not None:
            return "error"
        if self._stream is None or self._stream.finish_reason is None:
            return "closed" if self._over.is_set() else None
        return self._stream.finish_reason

    @property
    def done(self) -> bool:
        """True when no more pieces come."""
        return self._over.is_set()

    @property
    def ready(self) -> bool:
        """True if `next` will not wait: a piece is there, or the end."""
        return not self._pieces.empty()

    @property
    def stream(self) -> TextStream | TokenStream | None:
        """What samples the text, with its `logprobs`; None before the prompt is read."""
        return self._stream

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        while self._pieces.empty() and not self._scheduler.running:
            self._scheduler.tick()
        piece = self._pieces.get()
        if piece is not _END:
            return piece
        self._pieces.put(_END)  # asked again, it ends again
        if self.error is not None:
            raise self.error
        raise StopIteration

    def text(self) -> str:
        """The rest of the text in one string, when it is complete."""
        return "".join(self)

    def cancel(self) -> None:
        """Ends the request; its place is free at the next tick, and its session has what was shown until then."""
        self._closed = True
        self._scheduler._wake()

    def _tell(self, piece: Any) -> None:
        self._pieces.put(piece)
        if self._notify is not None:
            self._notify(self)

    def _finish(self, error: Exception | None = None) -> None:
        if self._over.is_set():
            return
        if self._stream is not None:
            self._stream.close()
        self.error = error
        self._over.set()
        self._tell(_END)


class Scheduler:
    """Writes many texts with one model.

    At most `rows` are worked on at a time, and no more than `state_bytes` of states (None: no bound); others wait their
    turn. `prefill` bounds the tokens of prompts in a tick. `cache` (that of the LLM, if it has one) keeps what prompts
    have in common. As a context manager it runs in a thread of its own, and what is not done at the end is cancelled;
    otherwise whoever iterates over a `Generation` runs it. `submit` and `cancel` may be called from any thread.
    """

    def __init__(
        self,
        llm: LLM,
        *,
        rows: int = 64,
        prefill: int = 256,
        state_bytes: int | None = None,
        cache: StateCache | None = None,
    ) -> None:
        if rows < 1 or prefill < 1:
            raise ValueError(f"rows and prefill must be 1 or more, got {rows} and {prefill}")
        self.llm, self.rows, self.prefill, self.state_bytes = llm, rows, prefill, state_bytes
        self.cache = llm.cache if cache is None else cache
        if self.cache is not None:
            self.cache.bind(llm.runner)
        self.counts = {"ticks": 0, "prompt_tokens": 0, "cached_tokens": 0, "tokens": 0}
        """What was done so far; tokens of prompts are those that were read, cached ones those that were not."""
        self._fresh_bytes = 0 if state_bytes is None else llm.runner.init_state().nbytes
        self._waiting: deque[Generation] = deque()
        self._active: list[Generation] = []
        self._changed = threading.Condition()
        self._ticking = threading.Lock()
        self._thread: threading.Thread | None = None
        self._stopping = False

    def submit(
        self,
        prompt: str | Sequence[int],
        max_tokens: int = 256,
        *,
        session: Session | None = None,
        llm: LLM | None = None,
        cache: StateCache | None = None,
        tokens: bool = False,
        stop: str | Sequence[str] = (),
        notify: Callable[[Generation], None] | None = None,
        watch: Callable[[Generation], None] | None = None,
        **options: Any,
    ) -> Generation:
        """Asks for the text that follows `prompt`; `options` are those of `Session.stream`, and wrong ones raise here.

        `session` is continued instead of a new one; nobody else may use it until the request is done. `llm` is another
        start or an adapter on the same weights (`LLM.starting_from`, `LLM.adapted`), `cache` what keeps its prefixes.
        With `tokens` the pieces are token ids. `notify` is called on the scheduler's thread when a piece is there, and
        at the end, `watch` whenever tokens have been read, while the session's state holds still.
        """
        llm = llm or self.llm
        if base_of(llm.runner) is not base_of(self.llm.runner):
            raise ValueError("this scheduler runs another model; give the text to that model's own scheduler")
        stops = None if tokens else (stop,) if isinstance(stop, str) else tuple(stop)
        order = Order.of(llm, max_tokens, stop=stops, **options)
        order = replace(order, speculate=None)  # a batch has no time to lose on guesses; the text is the same
        ids = llm.tokens_of(prompt)
        if session is not None:
            session._end_stream()
        if not ids and (session is None or (session._at.logits is None and not session._at.unread)):
            raise ValueError("there is nothing to go on from: give a prompt, or token 0 for a text from nowhere")
        if cache is None:
            cache = self.cache if llm is self.llm else llm.cache
        if cache is not None:
            cache.bind(llm.runner)
        generation = Generation(self, llm, ids, order, session, cache, notify, watch)
        with self._changed:
            if self._stopping:
                raise RuntimeError("the scheduler has stopped; no request is taken any more")
            self._waiting.append(generation)
            self._changed.notify()
        return generation

    @property
    def running(self) -> bool:
        """True while a thread of the scheduler's own does the work."""
        return self._thread is not None

    @property
    def load(self) -> tuple[int, int]:
        """How many requests are being worked on, and how many wait."""
        return len(self._active), len(self._waiting)

    def __enter__(self) -> Self:
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name="rookery-scheduler", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()
        self._thread = None
        for generation in (*self._active, *self._waiting):
            generation._finish()
        self._active.clear()
        self._waiting.clear()
        self._stopping = False

    def run(self) -> None:
        """Works until nothing is left to do."""
        while self.tick():
            pass

    def tick(self) -> bool:
        """One step of every text; False if there was nothing to do."""
        with self._ticking:
            self._admit()
            if not self._active:
                return False
            self.counts["ticks"] += 1
            batch = self._batch()
            try:
                self._forward(batch)
                for generation, _, _ in batch:
                    if generation._watch is not None:
                        generation._watch(generation)
            except Exception as error:
                # the states of this batch may be anywhere between two tokens; the other requests go on
                for generation, _, _ in batch:
                    generation._finish(error)
            for generation in self._active:
                if not generation.done and generation._read == len(generation.prompt) and generation.session:
                    self._write(generation)
            self._active = [generation for generation in self._active if not generation.done]
            return True

    def _work(self) -> None:
        while True:
            with self._changed:
                while not (self._active or self._waiting or self._stopping):
                    self._changed.wait()
                if self._stopping:
                    return
            try:
                self.tick()
            except Exception as error:  # our mistake; but nobody may wait for ever because this thread is gone
                log.exception("the scheduler failed; all its requests end")
                for generation in (*self._active, *self._waiting):
                    generation._finish(error)

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify()

    def _admit(self) -> None:
        for generation in self._active:
            if generation._closed:
                generation._finish()
        self._active = [generation for generation in self._active if not generation.done]
        with self._changed:
            if any(generation._closed for generation in self._waiting):
                for generation in self._waiting:
                    if generation._closed:
                        generation._finish()
                self._waiting = deque(generation for generation in self._waiting if not generation.done)
            size = 0 if self.state_bytes is None else self._row_bytes()
            while self._waiting and len(self._active) < self.rows:
                if self.state_bytes is not None and self._active and (len(self._active) + 1) * size > self.state_bytes:
                    break
                self._active.append(self._waiting.popleft())

    def _row_bytes(self) -> int:
        """Bytes of the largest state so far; those of most models never grow."""
        return max([self._fresh_bytes, *(g.session.nbytes for g in self._active if g.session)])

    def _batch(self) -> list[tuple[Generation, tuple[int, ...], bool]]:
        """Request, its tokens for this tick, and whether logits are wanted after them."""
        batch, budget = [], self.prefill
        reading: list[Generation] = []
        for generation in self._active:
            prompt = generation.prompt
            if generation._read < len(prompt) or generation.session is None:
                if budget <= 0 or not self._begin(generation, reading):
                    continue
                reading.append(generation)
                end = min(generation._cuts[0] if generation._cuts else len(prompt), generation._read + budget)
                piece = prompt[generation._read : end]
                budget -= len(piece)
                generation._read = end
                self.counts["prompt_tokens"] += len(piece)
                generation.session._at.add(piece)
                generation.session.context.extend(piece)
            if unread := generation.session._at.unread:
                # a snapshot is worth little without the logits that follow it
                at_cut = bool(generation._cuts) and generation._cuts[0] == generation._read
                batch.append((generation, unread, at_cut or generation._read == len(prompt)))
        return batch

    def _begin(self, generation: Generation, reading: list[Generation]) -> bool:
        try:
            return self._begun(generation, reading)
        except Exception as error:  # no memory for one more state, for example: the others go on
            generation._finish(error)
            return False

    def _begun(self, generation: Generation, reading: list[Generation]) -> bool:
        """Makes the session of a request whose prompt is to be read; False if it waits for another's state."""
        if generation.session is not None:
            return True
        llm, cache = generation.llm, generation.cache
        if cache is None:
            generation.session = Session(llm)
            return True
        prompt = np.asarray(generation.prompt)
        alike = [other for other in reading if other._fresh and other.cache is cache]
        if any(common(prompt, other.prompt) >= WORTH_WAITING for other in alike):
            return False
        hit = cache.find(generation.prompt)
        generation.session = Session(llm, hit.position)
        generation._read = generation.cached = hit.length
        self.counts["cached_tokens"] += hit.length
        cuts = {*cuts_of(generation.prompt, hit)}
        others = [*self._active, *list(self._waiting)[:LOOK_AHEAD]]
        others = [other for other in others if other.session is None and other._fresh and other.cache is cache]
        shared = (common(prompt, other.prompt) for other in others[:LOOK_AHEAD])
        cuts |= {length for length in shared if length >= WORTH_WAITING and length > hit.length}
        generation._cuts = sorted(cuts)
        return True

    def _forward(self, batch: list[tuple[Generation, tuple[int, ...], bool]]) -> None:
        if not batch:
            return
        positions: list[Position] = [generation.session._at for generation, _, _ in batch]
        for at in positions:
            at.logits, at.unread = None, ()  # as far as an interruption is concerned, they are read
        logits = self.llm.runner.forward_rows(
            [tokens for _, tokens, _ in batch],
            [at.state for at in positions],
            ["last" if wanted else "none" for _, _, wanted in batch],
        )
        for (generation, _, wanted), at, row in zip(batch, positions, logits):
            if wanted:
                # a row by itself: a view would keep the logits of the whole batch alive
                at.logits = row[-1].copy()
            if generation._cuts and generation._cuts[0] == generation._read:
                del generation._cuts[0]
                generation.cache.keep(generation.prompt[: generation._read], at)

    def _write(self, generation: Generation) -> None:
        """Samples the next token of one text and tells what can be shown."""
        try:
            if generation._stream is None:
                generation._stream = generation.session.open(generation.order)
            stream, before = generation._stream, len(generation.tokens)
            piece = stream.advance()
            self._say(generation, piece)
            if stream.full:  # it ends here, and need not wait for its last token to be read
                self._say(generation, stream.advance())
            self.counts["tokens"] += len(stream.tokens) - before
            if stream.finish_reason is not None:
                if isinstance(stream, TextStream):
                    self._say(generation, stream.unfinished())
                self._keep_turn(generation)
                generation._finish()
        except Exception as error:
            generation._finish(error)

    def _keep_turn(self, generation: Generation) -> None:
        """Keeps the state at the end of a text: the next turn of a conversation begins with both."""
        if generation.cache is None or not generation._fresh:
            return
        at = generation.session._at
        # the last token may be unread, and what a stop string took back is not in the state
        told = [*generation.prompt, *generation.tokens][: at.state.tokens_seen]
        if len(told) > len(generation.prompt):
            generation.cache.keep(told, Position(at.state, at.logits, recent=tuple(told[-RECENT:])))

    @staticmethod
    def _say(generation: Generation, piece: str | int | None) -> None:
        if piece is not None and piece != "":
            generation._tell(piece)
