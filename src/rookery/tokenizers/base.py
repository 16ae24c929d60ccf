"""What every tokenizer offers, and text that arrives token by token."""

import codecs
import os
from collections.abc import Iterable
from typing import Protocol, runtime_checkable


@runtime_checkable
class Tokenizer(Protocol):
    """Text to token ids and back. Errors are `BadTokenizer`."""

    name: str
    """What `resolve` finds it by: "world", "20b", "bytes", or the name of its file."""
    vocab_size: int
    """The largest token id plus one; a model may have more rows than that, which no text uses."""
    eos_id: int
    """Token that ends a text; it has no bytes."""

    def encode(self, text: str | bytes) -> list[int]:
        """Token ids of `text`; nothing is added, and bytes need not be valid UTF-8."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD."""

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of `ids`, also where they end inside a character."""

    def token_bytes(self, index: int) -> bytes:
        """The bytes of one token, empty for end of text."""

    def stream(self) -> "StreamDecoder":
        """Decodes tokens as they come."""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a file that `load_tokenizer` reads."""


class StreamDecoder:
    """Text of a stream of tokens, piece by piece.

    Holds back only the beginning of a character that may still be completed (at most 3 bytes); bytes that cannot
    become UTF-8 any more are replaced by U+FFFD at once. All pieces with `finish()` make the same text as decoding the
    tokens together.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    @property
    def pending(self) -> bytes:
        """What is held back."""
        return self._utf8.getstate()[0]

    def push(self, *ids: int) -> str:
        """The text that is complete once these tokens have come."""
        return self._utf8.decode(self._tokenizer.decode_bytes(ids))

    def finish(self) -> str:
        """The text left when no more tokens come; the decoder is as new afterwards."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest

    def copy(self) -> "StreamDecoder":
        """A decoder that goes on from here by itself."""
        other = StreamDecoder(self._tokenizer)
        other._utf8.setstate(self._utf8.getstate())
        return other
