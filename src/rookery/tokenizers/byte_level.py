"""Bytes as tokens: id = byte value, as in rwkv.cpp's tiny models (the World vocabulary has byte + 1)."""

import os
from collections.abc import Iterable

from rookery.errors import BadTokenizer
from rookery.tokenizers.base import StreamDecoder


class ByteTokenizer:
    """One token a byte of UTF-8. Id 0 ends a text: it is the byte 0, which texts do not contain."""

    name = "bytes"
    vocab_size = 256
    eos_id = 0

    def encode(self, text: str | bytes) -> list[int]:
        """The bytes of `text`."""
        return list(text if isinstance(text, bytes) else utf8(text))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; what is not UTF-8 becomes U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """`ids` as bytes, without end of text."""
        ids = [int(index) for index in ids]
        for index in ids:
            if not 0 <= index < 256:
                raise BadTokenizer(f"token {index} is unknown to the byte tokenizer; its ids are 0 to 255.")
        return bytes(ids).replace(b"\0", b"")

    def token_bytes(self, index: int) -> bytes:
        """The byte; empty for end of text."""
        return self.decode_bytes([index])

    def stream(self) -> StreamDecoder:
        """Decodes tokens as they come."""
        return StreamDecoder(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """There is nothing to write."""
        raise BadTokenizer(f'the byte tokenizer needs no file such as {os.fspath(path)!r}; name it "bytes".')


def utf8(text: str) -> bytes:
    """UTF-8 of `text`; BadTokenizer where half of a surrogate pair stands alone."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadTokenizer(
            f"character {error.start} of the text is a lone surrogate ({text[error.start]!r}), which is not text; "
            'replace it, for instance with text.encode("utf-8", "replace").'
        ) from None


def byte_letters() -> dict[str, int]:
    """The printable letter that stands for each byte in byte-level BPE files (GPT-2's table), letter to byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
