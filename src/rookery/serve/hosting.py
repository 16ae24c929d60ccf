"""A model that is served: its scheduler, its states, and the bridge from its thread to the event loop."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from rookery.engine.llm import LLM
from rookery.engine.scheduler import Generation, Scheduler
from rookery.engine.session import Session
from rookery.engine.state_cache import StateCache
from rookery.serve.schema import ApiError
from rookery.serve.states import StateStore
from rookery.serve.watching import Progress, Watcher

LONG = 20_000
"""Characters of a prompt that is encoded on a thread of its own."""


class Limits(NamedTuple):
    """What one server does at most."""

    rows: int = 64
    """Texts that are written at the same time."""
    queue: int = 256
    """Texts that wait; more are turned away."""
    max_tokens: int = 4096
    """Of one answer; what is asked for beyond is cut."""
    seconds: float = 600.0
    """Of one answer."""
    body: int = 8 << 20
    """Bytes of a request."""
    states: int = 256 << 20
    """Bytes of kept states in memory, for each model."""
    disk: int = 16 << 30
    """Bytes of kept states in the folder, for each model."""
    expiry: float = 24 * 3600.0
    """Seconds until a kept state that nobody uses is forgotten."""


class Hosted:
    """One model of the server. Models on the same weights share one scheduler, and so their batches."""

    def __init__(
        self,
        name: str,
        llm: LLM,
        limits: Limits,
        *,
        scheduler: Scheduler | None = None,
        parent: str | None = None,
        folder: Path | None = None,
        place: str = "",
    ) -> None:
        self.name, self.llm, self.limits = name, llm, limits
        self.parent = parent
        """Name of the model whose weights it takes, where it is an adapter or a tuned state."""
        self.cache = StateCache()
        self.shares = scheduler is not None
        self.scheduler = scheduler or Scheduler(llm, rows=limits.rows, cache=self.cache)
        kept = None if folder is None else folder / quote(f"model {name}", safe="")  # one model does not see another's
        self.states = StateStore(llm, limits.states, limits.expiry, folder=kept, disk_budget=limits.disk, place=place)

    @property
    def busy(self) -> bool:
        """True if one more text would find the queue full."""
        return self.scheduler.load[1] >= self.limits.queue

    async def ids(self, prompt: str | Sequence[int]) -> str | Sequence[int]:
        """The prompt for `submit`; one so long that encoding it would keep others waiting comes back as token ids."""
        if not isinstance(prompt, str) or len(prompt) < LONG:
            return prompt
        try:
            return await asyncio.to_thread(self.llm.tokens_of, prompt)
        except ValueError as wrong:
            raise ApiError(400, str(wrong), param="prompt") from None

    def submit(
        self,
        prompt: str | Sequence[int],
        max_tokens: int,
        session: Session | None,
        *,
        watched: bool = False,
        **options: Any,
    ) -> "Running":
        """Hands a text to the scheduler; ApiError where the queue is full or the options make no sense."""
        if self.busy:
            waiting = self.scheduler.load[1]
            raise ApiError(429, f"{waiting} texts wait already; try again later", code="queue_full", retry=2)
        loop, changed = asyncio.get_running_loop(), asyncio.Event()

        def notify(_: Generation) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
                loop.call_soon_threadsafe(changed.set)

        watcher = Watcher(notify) if watched else None
        try:
            generation = self.scheduler.submit(
                prompt,
                min(max_tokens, self.limits.max_tokens),
                session=session,
                llm=self.llm,
                cache=self.cache,
                notify=notify,
                watch=watcher,
                **options,
            )
        except (ValueError, TypeError) as wrong:
            raise ApiError(400, str(wrong)) from None
        except RuntimeError as stopping:
            raise ApiError(503, str(stopping), retry=5) from None
        return Running(generation, changed, self.limits.seconds, watcher)


class Running:
    """A text that is being written."""

    def __init__(
        self, generation: Generation, changed: asyncio.Event, seconds: float, watcher: Watcher | None = None
    ) -> None:
        self.generation, self._changed, self._seconds, self._watcher = generation, changed, seconds, watcher
        self._told = 0

    async def pieces(self) -> AsyncIterator[str]:
        """Its pieces of text as they come."""
        async for event in self.events():
            if isinstance(event, str):
                yield event

    async def events(self) -> AsyncIterator[str | Progress]:
        """Its pieces as they come and, where it is watched, how its state moves.

        Whoever stops listening ends it; one that takes too long is ended with ApiError.
        """
        try:
            async with asyncio.timeout(self._seconds):
                while True:
                    await self._changed.wait()
                    self._changed.clear()
                    if self._watcher is not None and (progress := self._watcher.take()):
                        yield progress
                    while self.generation.ready:
                        try:
                            text = next(self.generation)
                        except StopIteration:
                            return
                        yield text
        except TimeoutError:
            raise ApiError(
                408, f"the answer took more than {self._seconds:g} s and was ended", code="timeout"
            ) from None
        except ValueError as wrong:
            if self.generation.order.grammar is None:
                raise
            raise ApiError(400, str(wrong), param="response_format") from None  # a form that no text can have
        finally:
            self.generation.cancel()

    async def text(self) -> str:
        """All of it."""
        return "".join([piece async for piece in self.pieces()])

    @property
    def finish_reason(self) -> str:
        """OpenAI's name for how it ended."""
        return "length" if self.generation.finish_reason == "length" else "stop"

    @property
    def prompt_tokens(self) -> int:
        return len(self.generation.prompt)

    @property
    def tokens(self) -> int:
        return len(self.generation.tokens)

    def fresh_logprobs(self) -> list[Any]:
        """What is known of tokens since the last call, if logprobs were asked for."""
        stream = self.generation.stream
        told = [] if stream is None else stream.logprobs[self._told :]
        self._told += len(told)
        return told


def usage(running: Sequence[Running]) -> dict[str, Any]:
    """OpenAI's counts of several answers to one prompt each."""
    prompt, written = sum(one.prompt_tokens for one in running), sum(one.tokens for one in running)
    cached = sum(one.generation.cached for one in running)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": written,
        "total_tokens": prompt + written,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
