"""Vocabulary files in the text format of RWKV's World vocabulary, read and written.

One piece a line: its id, a Python literal (`'text'` as UTF-8, or `b'bytes'`), its length in bytes, separated by spaces.
Ids increase; id 0 means end of text and is not in the file.
(github.com/BlinkDL/ChatRWKV, rwkv_pip_package/src/rwkv/rwkv_tokenizer.py)
"""

import ast
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from rookery.checkpoints.atomic import replacing
from rookery.errors import BadTokenizer

MAX_ID = (1 << 23) - 1
"""Larger ids are taken for damage: every id below the largest costs memory."""
MAX_PIECE = 65535
"""Longest piece in bytes."""


def parse_vocabulary(data: bytes, name: str = "the vocabulary") -> dict[int, bytes]:
    """Pieces by id, in the file's order; CRLF line ends and empty lines at the end are fine.

    Raises `BadTokenizer`, naming the line, when a line is not `id literal length`, the length is wrong, an id does not
    exceed the one before it, or a piece is empty or already there.
    """
    pieces: dict[int, bytes] = {}
    lines_of: dict[bytes, int] = {}
    last = 0
    for number, line in enumerate(data.rstrip(b"\r\n").split(b"\n"), start=1):
        where = f"{name}, line {number}"
        index, piece = _parse_line(line.removesuffix(b"\r"), where)
        if index <= last:
            raise BadTokenizer(f"{where}: id {index} after id {last}; ids start at 1 and increase (0 is end of text).")
        if piece in lines_of:
            raise BadTokenizer(f"{where}: {piece!r} is already on line {lines_of[piece]}; remove one of the two.")
        last, pieces[index], lines_of[piece] = index, piece, number
    return pieces


def _parse_line(line: bytes, where: str) -> tuple[int, bytes]:
    # literals contain spaces: the id ends at the first space, the length starts after the last one
    head, _, rest = line.partition(b" ")
    literal, _, length = rest.rpartition(b" ")
    if not (head.isdigit() and literal and length.isdigit()):
        raise BadTokenizer(f"{where}: {_shorten(line)} is not `id 'piece' length`; is this a World-format vocabulary?")
    try:
        value = ast.literal_eval(literal.decode("utf-8"))
        piece = value.encode("utf-8") if isinstance(value, str) else value
    except (ValueError, SyntaxError):  # UnicodeError is a ValueError
        raise BadTokenizer(f"{where}: {_shorten(literal)} is not a Python string or bytes literal.") from None
    if not isinstance(piece, bytes) or not 0 < len(piece) <= MAX_PIECE:
        raise BadTokenizer(f"{where}: a piece is a string or bytes of 1 to {MAX_PIECE} bytes, not {_shorten(literal)}.")
    if len(piece) != int(length):
        raise BadTokenizer(f"{where}: {_shorten(literal)} has {len(piece)} bytes, the line says {int(length)}.")
    if int(head) > MAX_ID:
        raise BadTokenizer(f"{where}: id {int(head)} is larger than {MAX_ID}, the largest one supported.")
    return int(head), piece


def _shorten(line: bytes) -> str:
    text = repr(line.decode("utf-8", errors="replace"))
    return text if len(text) <= 60 else text[:57] + "..."


def format_vocabulary(pieces: Mapping[int, bytes]) -> bytes:
    """The text form of pieces by id."""
    return b"".join(_format_line(index, piece) for index, piece in pieces.items())


def _format_line(index: int, piece: bytes) -> bytes:
    try:
        literal = repr(piece.decode("utf-8"))
    except UnicodeDecodeError:  # a byte of a longer sequence, or a piece cut inside one
        literal = repr(piece)
    return f"{index} {literal} {len(piece)}\n".encode()


def write_vocabulary(pieces: Sequence[bytes] | Mapping[int, bytes], path: str | os.PathLike[str]) -> None:
    """Writes pieces by id (a sequence: from 1); `BadTokenizer` where `parse_vocabulary` would not read them back."""
    data = format_vocabulary(pieces if isinstance(pieces, Mapping) else dict(enumerate(pieces, start=1)))
    parse_vocabulary(data, name=Path(path).name)
    with replacing(path) as temporary:
        temporary.write_bytes(data)
