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
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from rookery.checkpoints.tuned_state import start_arrays
from rookery.engine.position import Position, position_of, write_position
from rookery.engine.stream import Order, TextStream, TokenStream
from rookery.engine.text import StopStrings
from rookery.errors import BadState

if TYPE_CHECKING:
    from rookery.engine.llm import LLM
    from rookery.engine.runners.protocol import RowState

END_OF_TEXT = 0
"""The token that ends a text in every RWKV vocabulary."""
CHUNK = 512
"""Tokens of a prompt that are read in one call: bounds memory, and lets an interruption through."""
KEPT = 64
"""Snapshots that a session keeps at most: memory must not grow with a conversation."""
CONTEXT = 2048
"""Tokens of a session that are remembered as such."""


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
    def state(self) -> RowState:
        """What the model remembers, to be looked at: a token that was sampled last may not be in it yet."""
        return self._at.state

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

    def save(self, path: str | os.PathLike[str], extra: Mapping[str, np.ndarray] | None = None) -> None:
        """Writes everything the session needs to go on exactly; `LLM.session(state=path)` reads it.

        Beside the state the file holds the logits that follow it, so that going on reads no token twice, and `extra`
        arrays, which `read_position` gives back.
        """
        at = self._shown()
        self._read(at)
        write_position(path, at, self.llm.runner, extra)

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
