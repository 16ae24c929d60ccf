"""Tokenizers in Hugging Face's `tokenizer.json`: GPT-NeoX' 20B of the Pile models, Qwen's, word lists."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rookery.errors import BadTokenizer, MissingDependency
from rookery.tokenizers.base import StreamDecoder
from rookery.tokenizers.byte_level import byte_letters, utf8

_ENDS = ("<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "</s>", "<eos>", "[EOS]")


class HuggingFaceTokenizer:
    """A `tokenizer.json`. Special tokens written out in a text are recognised, none is added.

    Raises `BadTokenizer` for a file that the `tokenizers` package does not read.
    """

    def __init__(self, path: str | os.PathLike[str], name: str | None = None) -> None:
        path = Path(path)
        _package()
        try:
            content = path.read_bytes()
        except OSError as error:
            raise BadTokenizer(f"cannot read the tokenizer {str(path)!r}: {error.strerror}.") from error
        self._read(content, name or path.name, str(path))

    @classmethod
    def from_json(cls, text: str, name: str, eos_id: int | None = None) -> "HuggingFaceTokenizer":
        """The tokenizer that the contents of a `tokenizer.json` describe; `eos_id` where these do not tell it."""
        tokenizer = cls.__new__(cls)
        tokenizer._read(text.encode("utf-8"), name, name)
        if eos_id is not None:
            tokenizer.eos_id = eos_id
        return tokenizer

    def to_json(self) -> str:
        """The contents of a `tokenizer.json`."""
        return self._tokenizer.to_str()

    def _read(self, content: bytes, name: str, where: str) -> None:
        package = _package()
        self.name = name
        try:
            self._tokenizer = package.Tokenizer.from_str(content.decode("utf-8"))
        except Exception as error:  # the package raises Exception itself
            raise BadTokenizer(f"{where!r} is not a tokenizer.json: {error}.") from error
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise BadTokenizer(f"{where!r} has no tokens.")
        self._texts = {index: text for text, index in vocabulary.items()}
        self.vocab_size = max(self._texts) + 1
        self.eos_id = next((vocabulary[end] for end in _ENDS if end in vocabulary), 0)
        self._bytes = _bytes_of_tokens(self._tokenizer, self._texts)

    def encode(self, text: str | bytes) -> list[int]:
        """Token ids of `text`; bytes must be UTF-8 here, BadTokenizer if not."""
        if isinstance(text, bytes):
            try:
                text = text.decode("utf-8")
            except UnicodeDecodeError as error:
                raise BadTokenizer(
                    f"offset {error.start}: byte 0x{text[error.start]:02x} is not UTF-8; the tokenizer {self.name!r} "
                    "encodes only text."
                ) from None
        else:
            utf8(text)  # the package would panic on a lone surrogate
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; what is not UTF-8 becomes U+FFFD."""
        ids = self._checked(ids)
        if self._bytes is not None:
            return self.decode_bytes(ids).decode("utf-8", errors="replace")
        return self._tokenizer.decode([index for index in ids if index != self.eos_id], skip_special_tokens=False)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of `ids`."""
        ids = self._checked(ids)
        if self._bytes is None:
            return self.decode(ids).encode("utf-8")
        return b"".join(self._bytes[index] for index in ids if index != self.eos_id)

    def token_bytes(self, index: int) -> bytes:
        """The bytes of one token by itself; empty for end of text."""
        return self.decode_bytes([index])

    def stream(self) -> StreamDecoder:
        """Decodes tokens as they come."""
        return StreamDecoder(self) if self._bytes is not None else _WordStream(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the `tokenizer.json`."""
        from rookery.checkpoints.atomic import replacing

        with replacing(path) as temporary:
            temporary.write_text(self.to_json(), encoding="utf-8")

    def _checked(self, ids: Iterable[int]) -> list[int]:
        ids = [int(index) for index in ids]
        for index in ids:
            if index not in self._texts:
                raise BadTokenizer(
                    f"token {index} is unknown to the tokenizer {self.name!r}, whose ids end at {self.vocab_size - 1}."
                )
        return ids


def _package() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise MissingDependency("reading tokenizer.json needs `pip install tokenizers`.") from error
    return tokenizers


class _WordStream(StreamDecoder):
    """For decoders that look at a token's neighbours (spaces between words): the text that the newest tokens add."""

    def __init__(self, tokenizer: HuggingFaceTokenizer) -> None:
        super().__init__(tokenizer)
        self._context: list[int] = []  # the tokens shown last
        self._new: list[int] = []  # not shown yet: they end inside a character

    def push(self, *ids: int) -> str:
        return "".join(self._push(index) for index in ids)

    def _push(self, index: int) -> str:
        self._new.append(index)
        text = self._added()
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        self._context, self._new = self._new, []
        return text

    def _added(self) -> str:
        before = self._tokenizer.decode(self._context)
        return self._tokenizer.decode(self._context + self._new)[len(before) :]

    def finish(self) -> str:
        rest = self._added()
        self._context, self._new = [], []
        return rest

    def copy(self) -> "_WordStream":
        other = _WordStream(self._tokenizer)
        other._context, other._new = list(self._context), list(self._new)
        return other


def _bytes_of_tokens(tokenizer: Any, texts: dict[int, str]) -> dict[int, bytes] | None:
    """The bytes of every token of a byte-level tokenizer, else None."""
    decoder = json.loads(tokenizer.decoder.__getstate__()) if tokenizer.decoder is not None else {}
    if "ByteLevel" not in (step.get("type") for step in [decoder, *decoder.get("decoders", [])]):
        return None
    letters = byte_letters()
    added = tokenizer.get_added_tokens_decoder()  # these stand for themselves
    return {
        index: added[index].content.encode("utf-8") if index in added else bytes(letters[letter] for letter in text)
        for index, text in texts.items()
    }
