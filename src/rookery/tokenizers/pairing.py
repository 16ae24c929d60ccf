"""Which tokenizer belongs to a model.

Files seldom say it, but published models pair by the rows of their embedding: 65536 with the World vocabulary, 50277
or 50304 (padded) with GPT-NeoX' 20B tokenizer, 256 with bytes.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rookery.errors import BadTokenizer
from rookery.tokenizers.base import Tokenizer
from rookery.tokenizers.byte_level import ByteTokenizer
from rookery.tokenizers.trie import TrieTokenizer

ASSETS = Path(__file__).parents[1] / "assets"
NAMES = ("world", "20b", "bytes")
"""Tokenizers that come with the package."""
ROWS = {65536: "world", 50277: "20b", 50304: "20b", 256: "bytes"}
"""Rows of the embedding, and the tokenizer that published models of so many rows use."""
BLANK_LINE_20B, LINE_END_20B = 535, 187
r"""The 20B tokenizer's "\n\n" and "\n"."""
FILES = ("tokenizer.json", "vocab.txt", "rwkv_vocab_v20230424.txt", "20B_tokenizer.json")
"""File names by which a tokenizer is found beside its model."""


def load_tokenizer(name: str | os.PathLike[str]) -> Tokenizer:
    """One of `NAMES`, a vocabulary file (World format or tokenizer.json), or a folder that has one."""
    if name == "world":
        return TrieTokenizer.from_file(ASSETS / "rwkv_vocab_v20230424.txt", name="world")
    if name == "20b":
        return _from_json(ASSETS / "20B_tokenizer.json", name="20b")
    if name == "bytes":
        return ByteTokenizer()
    path = Path(name)
    if path.is_dir():
        found = next((path / file for file in FILES if (path / file).is_file()), None)
        if found is None:
            raise BadTokenizer(f"the folder {str(path)!r} has no tokenizer; looked for {', '.join(FILES)}.")
        path = found
    if not path.is_file():
        raise BadTokenizer(
            f"no tokenizer {str(name)!r}: it is neither {', '.join(NAMES)} nor a vocabulary file or tokenizer.json."
        )
    with path.open("rb") as file:
        is_json = file.read(64).lstrip().startswith(b"{")
    return _from_json(path) if is_json else TrieTokenizer.from_file(path)


def _from_json(path: Path, name: str | None = None) -> Tokenizer:
    from rookery.tokenizers.huggingface import HuggingFaceTokenizer

    return HuggingFaceTokenizer(path, name)


def prompt_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a text that a model is to continue.

    The 20B tokenizer has one token for two line ends, behind which Pile models were seldom at a text's end: a prompt
    ends in two single ones instead, as in the official chat code (core.md 3.2).
    """
    ids = tokenizer.encode(text)
    if getattr(tokenizer, "name", None) == "20b" and ids[-1:] == [BLANK_LINE_20B]:
        ids[-1:] = [LINE_END_20B] * 2
    return ids


def resolve(
    tokenizer: str | os.PathLike[str] | None = None,
    *,
    vocab_size: int,
    path: str | os.PathLike[str] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Tokenizer:
    """The tokenizer of a model with `vocab_size` rows that was read from the file or folder `path`.

    In this order: `tokenizer`, a name or file that the user gave; what the sidecar `NAME.json`, the model's `metadata`
    ("tokenizer", or GGUF's token list) or a tokenizer in the model's folder says; the rows; for a single model file,
    a tokenizer beside it. Raises `BadTokenizer` where none of them tells, or where it has more tokens than the model.
    """
    place = None if path is None else Path(path)
    if tokenizer is not None:
        return _fitting(load_tokenizer(tokenizer), vocab_size)
    for source in (_sidecar(place), metadata or {}):
        if found := _told(source, place, vocab_size):
            return _fitting(found, vocab_size)
    if place is not None and place.is_dir() and (beside := _beside(place)):
        return _fitting(load_tokenizer(beside), vocab_size)
    if vocab_size in ROWS:
        return load_tokenizer(ROWS[vocab_size])
    if place is not None and place.is_file() and (beside := _beside(place.parent)):
        return _fitting(load_tokenizer(beside), vocab_size)
    known = ", ".join(f"{rows}: {name}" for rows, name in ROWS.items())
    raise BadTokenizer(
        f"nothing tells which tokenizer belongs to a model of {vocab_size} tokens (known by size are {known}); "
        f"name one with --tokenizer: {', '.join(NAMES)}, or a vocabulary file."
    )


def _fitting(tokenizer: Tokenizer, vocab_size: int) -> Tokenizer:
    if tokenizer.vocab_size > vocab_size:
        raise BadTokenizer(
            f"the tokenizer {tokenizer.name!r} has {tokenizer.vocab_size} tokens, the model only {vocab_size}; "
            "name the right one with --tokenizer."
        )
    return tokenizer


def _sidecar(place: Path | None) -> Mapping[str, Any]:
    # NAME.json lies beside NAME.pth and the like, for formats that cannot carry text themselves
    if place is None or not place.is_file():
        return {}
    for file in (place.with_suffix(".json"), place.with_name(place.name + ".json")):
        if file.is_file() and file != place:
            try:
                content = json.loads(file.read_text(encoding="utf-8"))
            except ValueError as error:
                raise BadTokenizer(f"{str(file)!r}, which describes the model, is not JSON: {error}.") from None
            return content if isinstance(content, dict) else {}
    return {}


def _told(source: Mapping[str, Any], place: Path | None, vocab_size: int) -> Tokenizer | None:
    """What metadata say, if anything."""
    name = source.get("tokenizer")
    if isinstance(name, str) and name:
        folder = Path() if place is None else place if place.is_dir() else place.parent
        # a file may name what lies beside it and nothing else: "../../secret" or "/etc/x" is an attack
        if name not in NAMES and (Path(name).name != name or "\\" in name or name == ".."):
            raise BadTokenizer(f"the model's metadata name the tokenizer {name[:100]!r}, which is no plain file name.")
        return load_tokenizer(name if name in NAMES else folder / name)
    # a World model's list is the vocabulary that is here already
    if source.get("tokenizer.ggml.model") == "rwkv" and "tokenizer.ggml.tokens" in source and vocab_size not in ROWS:
        return from_gguf_tokens(source["tokenizer.ggml.tokens"])
    if source.get("tokenizer.ggml.model") == "gpt2" and "tokenizer.ggml.merges" in source:
        from rookery.tokenizers.gguf_bpe import from_gguf

        return from_gguf(source)
    return None


def _beside(folder: Path) -> Path | None:
    return next((folder / file for file in FILES if (folder / file).is_file()), None)


def from_gguf_tokens(tokens: Iterable[str | bytes]) -> TrieTokenizer:
    r"""From GGUF's `tokenizer.ggml.tokens` of an "rwkv" vocabulary: `\n`, `\xff` and the like escaped, id 0 a name.

    Fillers `[PAD…]` at the end stand for rows without a token.
    """
    pieces: dict[int, bytes] = {}
    for index, token in enumerate(tokens):
        text = token.encode("utf-8") if isinstance(token, str) else token
        if index > 0 and not re.fullmatch(rb"\[PAD\d+\]", text):
            pieces[index] = b"".join(_unescape(text))
    return TrieTokenizer.from_pieces(pieces, "the GGUF file's vocabulary")


def _unescape(text: bytes) -> Iterator[bytes]:
    letters = {b"n": b"\n", b"r": b"\r", b"t": b"\t"}
    for plain, code, letter in re.findall(rb"([^\\]+)|\\(?:x([0-9a-fA-F]{2})|(.))", text, re.DOTALL):
        yield bytes([int(code, 16)]) if code else letters.get(letter, letter) if letter else plain
