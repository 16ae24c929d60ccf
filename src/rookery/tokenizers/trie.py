"""World vocabularies and our own: greedy longest match over a list of byte strings.

No merges, no normalisation, no special tokens in text: at each position the longest piece that fits is taken, so any
bytes go in and come back. The compiled trie does it 30 times faster than Python's definition in reference.py.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from rookery.errors import BadTokenizer
from rookery.tokenizers.base import StreamDecoder
from rookery.tokenizers.byte_level import utf8

if TYPE_CHECKING:
    import numpy as np


class TrieTokenizer:
    """A vocabulary file in the World format (see vocabulary.py). Id 0 ends a text and has no bytes.

    A vocabulary that lacks some single bytes cannot encode every text: see `missing_bytes`.
    """

    eos_id = 0

    def __init__(self, trie: Any, name: str) -> None:
        self._trie = trie
        self.name = name
        self.vocab_size: int = trie.vocab_size

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], name: str | None = None) -> Self:
        """Raises `BadTokenizer`, naming the line, for a damaged file."""
        path = Path(path)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise BadTokenizer(f"cannot read the vocabulary {str(path)!r}: {error.strerror}.") from error
        return cls.from_text(data, name or path.name)

    @classmethod
    def from_text(cls, data: bytes, name: str) -> Self:
        """From the contents of a vocabulary file."""
        native = _native_trie()
        trie = native.parse(data) if native else None
        if trie is None:
            from rookery.tokenizers.vocabulary import parse_vocabulary

            return cls.from_pieces(parse_vocabulary(data, name), name)
        return cls(trie, name)

    @classmethod
    def from_pieces(cls, pieces: Mapping[int, bytes], name: str = "vocabulary") -> Self:
        """From pieces by id; ids increase from 1."""
        native = _native_trie()
        if native is None:
            from rookery.tokenizers.reference import ReferenceTrie

            return cls(ReferenceTrie(pieces), name)
        try:
            return cls(native.from_pieces(dict(pieces)), name)
        except ValueError as error:
            raise BadTokenizer(f"{name}: {error}.") from None

    def encode(self, text: str | bytes) -> list[int]:
        """Token ids of `text`. BadTokenizer for a lone surrogate or a byte that the vocabulary lacks."""
        try:
            return self._trie.encode(text)
        except (LookupError, UnicodeEncodeError) as error:
            raise self._cannot_encode(error, [text]) from None

    def encode_array(self, text: str | bytes) -> "np.ndarray":
        """As `encode`, a uint32 array: less memory for long texts."""
        try:
            return self._trie.encode_array(text)
        except (LookupError, UnicodeEncodeError) as error:
            raise self._cannot_encode(error, [text]) from None

    def encode_batch(self, texts: Sequence[str | bytes], threads: int = 0) -> "list[np.ndarray]":
        """A uint32 array for each text, on at most `threads` threads (0: as many as there are cores)."""
        try:
            return self._trie.encode_batch(texts, threads)
        except (LookupError, UnicodeEncodeError) as error:
            raise self._cannot_encode(error, texts) from None

    def _cannot_encode(self, error: LookupError | UnicodeEncodeError, texts: Sequence[str | bytes]) -> BadTokenizer:
        if isinstance(error, UnicodeEncodeError):
            for text in texts:
                if isinstance(text, str):
                    utf8(text)  # raises the error that says where
        offset, number = error.args if len(error.args) == 2 else (error.args[0], 0)
        data = texts[number] if isinstance(texts[number], bytes) else utf8(texts[number])
        which = f"text {number}, " if len(texts) > 1 else ""
        return BadTokenizer(
            f"{which}offset {offset}: byte 0x{data[offset]:02x} cannot be encoded; the vocabulary {self.name!r} lacks "
            f"{len(self.missing_bytes)} of the 256 single bytes."
        )

    @property
    def missing_bytes(self) -> bytes:
        """Single bytes without a token of their own; empty if every text can be encoded."""
        missing = bytearray()
        for byte in range(256):
            try:
                self._trie.encode(bytes([byte]))
            except LookupError:
                missing.append(byte)
        return bytes(missing)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; what is not UTF-8 becomes U+FFFD. BadTokenizer for an id without a piece."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of `ids`."""
        ids = ids.tolist() if hasattr(ids, "tolist") else list(ids)
        try:
            return self._trie.decode(ids)
        except LookupError as error:
            raise BadTokenizer(
                f"token {error.args[0]} is unknown to the vocabulary {self.name!r}, whose ids end at "
                f"{self.vocab_size - 1}."
            ) from None

    def token_bytes(self, index: int) -> bytes:
        """The bytes of one token; empty for end of text."""
        return self.decode_bytes([index])

    def stream(self) -> StreamDecoder:
        """Decodes tokens as they come."""
        return StreamDecoder(self)

    @property
    def pieces(self) -> dict[int, bytes]:
        """All pieces by id."""
        pieces = {}
        for index in range(1, self.vocab_size):
            try:
                pieces[index] = self._trie.decode([index])
            except LookupError:  # ids may have gaps
                continue
        return pieces

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the vocabulary file."""
        from rookery.tokenizers.vocabulary import write_vocabulary

        write_vocabulary(self.pieces, path)


def _native_trie() -> Any:
    try:
        from rookery._native import Trie
    except ImportError as error:
        # a source checkout that was not built: the definition does the same work, slowly
        import logging

        logging.getLogger("rookery").info("the tokenizer runs in Python: %s", error)
        return None
    return Trie
