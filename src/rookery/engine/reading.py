"""Reads files of any length into a session: a block of text in memory at a time, and a place to go on from."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from rookery.engine.position import position_of, write_position
from rookery.engine.session import CHUNK, Session
from rookery.errors import BadState

if TYPE_CHECKING:
    from rookery.engine.llm import LLM

BLOCK = 1 << 16
"""Bytes of text that are tokenised at a time."""
CHECKED = 4096
"""Bytes before a place by which its file is known again."""
_PLACE = "place"


@dataclass(frozen=True)
class Place:
    """How far a file was read."""

    offset: int
    """Bytes whose effect is in the session's state."""
    size: int
    """Bytes of the file."""
    check: int
    """CRC-32 of the last bytes before the place."""


def read_file(session: Session, path: str | os.PathLike[str], place: Place | None = None) -> Iterator[Place]:
    """Feeds a file of UTF-8 text to `session`, from `place` on; yields how far it is, after at most 512 tokens each.

    Whoever stops iterating leaves the session at the place told last, where a later call goes on as if there had been
    no pause. Memory does not grow with the file. BadState where the text before `place` is not what was read,
    ValueError for what is not UTF-8.
    """
    from rookery.tokenizers.blocks import tokens_of

    tokenizer = session.llm.tokenizer
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        offset = 0 if place is None else place.offset
        if place is not None and _check(file, offset) != place.check:
            raise BadState(f"{os.fspath(path)!r} is not the file that the session has read {offset} bytes of")
        file.seek(offset)
        try:
            for tokens, taken in tokens_of(_blocks(file), tokenizer):
                end = offset + taken
                # tokens that do not spell the text, as of tokenizers that change it, know no places inside a block
                exact = sum(len(tokenizer.token_bytes(token)) for token in tokens) == taken
                for start in range(0, len(tokens), CHUNK):
                    piece = tokens[start : start + CHUNK]
                    session.feed(piece)
                    if start + CHUNK >= len(tokens):
                        offset = end
                    elif exact:
                        offset += sum(len(tokenizer.token_bytes(token)) for token in piece)
                    else:
                        continue
                    yield Place(offset, size, _check_at(path, offset))
        except UnicodeDecodeError as error:
            raise ValueError(f"{os.fspath(path)!r} is not UTF-8 text: {error.reason} after byte {offset}") from None


def save_reading(session: Session, path: str | os.PathLike[str], place: Place) -> None:
    """Writes a session's file that knows the place in the file that it was reading."""
    at = session._shown()
    session._read(at)
    numbers = np.array([place.offset, place.size, place.check], np.int64)
    write_position(path, at, session.llm.runner, {_PLACE: numbers})


def load_reading(llm: LLM, path: str | os.PathLike[str]) -> tuple[Session, Place | None]:
    """The session in a file, and the place where it was reading, if it was."""
    from rookery.checkpoints.state_file import read_state

    session = llm.session(path)  # any file that a session can start from
    try:
        _, extra = position_of(read_state(path, model=llm.runner.fingerprint()), llm.runner)
    except BadState:
        return session, None  # a tuned state, which has read nothing
    return session, Place(*extra[_PLACE].tolist()) if _PLACE in extra else None


def _blocks(file: BinaryIO) -> Iterator[bytes]:
    while block := file.read(BLOCK):
        yield block


def _check_at(path: str | os.PathLike[str], offset: int) -> int:
    with Path(path).open("rb") as file:
        return _check(file, offset)


def _check(file: BinaryIO, offset: int) -> int:
    start = max(0, offset - CHECKED)
    file.seek(start)
    return zlib.crc32(file.read(offset - start))
