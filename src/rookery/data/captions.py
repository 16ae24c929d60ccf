"""Pictures with their texts from JSONL, CSV or webdataset archives, and which text a training step reads.

A picture may have a text from the web ("raw"), one that a captioner wrote ("synthetic"), one that a language model made
of both ("generated") and a list of "tags" (RWKV-CLIP, arXiv 2406.06973). Every step draws one of those it has.
"""

import csv
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from rookery.data.images import SUFFIXES, Slice, Source, read_image, tar_members

log = logging.getLogger("rookery")

KINDS = ("raw", "synthetic", "generated", "tags")
"""Names of the texts of a picture."""
ALIASES = {"caption": "raw", "text": "raw", "txt": "raw", "title": "raw"}
"""What else files call them."""


@dataclass(frozen=True)
class Pair:
    """A picture and what is said of it."""

    source: Source
    texts: Mapping[str, str | tuple[str, ...]]
    """Kind -> text; "tags" a tuple of words."""
    group: str = ""
    """Pairs with the same group are right answers for one another; empty for a pair of its own."""
    name: str = field(default="", compare=False)
    """What messages call it."""

    def pixels(self, channels: int = 3) -> np.ndarray:
        """uint8 [height, width, channels]"""
        return read_image(self.source, channels)


def read_pairs(path: str | os.PathLike[str]) -> list[Pair]:
    """Pairs of a .jsonl with an "image" (a path, relative to the file) and texts a line, of a .csv or .tsv with such
    columns, or of a .tar whose members KEY.jpg, KEY.txt and KEY.json belong together.

    Rows without any text are left out, and their number is logged. ValueError that names the line for a row without a
    picture and for what cannot be read, and where no pair is left.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r}")
    readers = {".jsonl": _jsonl, ".csv": _table, ".tsv": _table, ".tar": _webdataset}
    if path.suffix not in readers:
        raise ValueError(f"{path}: pairs are read from {', '.join(readers)}")
    pairs = readers[path.suffix](path)
    kept = [pair for pair in pairs if pair.texts]
    if len(kept) < len(pairs):
        log.warning("%s: %d of %d pictures have no text and are left out", path, len(pairs) - len(kept), len(pairs))
    if not kept:
        raise ValueError(f"{path} holds no picture with a text; texts are called {', '.join((*KINDS, *ALIASES))}")
    return kept


def _jsonl(path: Path) -> list[Pair]:
    pairs = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except ValueError as problem:
                raise ValueError(f"{where} is not JSON: {problem}") from None
            if not isinstance(row, dict):
                raise ValueError(f"{where} is no JSON object")
            pairs.append(_pair(row, path.parent, where))
    return pairs


def _table(path: Path) -> list[Pair]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",")
        return [_pair(row, path.parent, f"{path}, line {rows.line_num}") for row in rows]


def _pair(row: Mapping[str, object], folder: Path, where: str) -> Pair:
    name = next((row[key] for key in ("image", "filepath", "file") if row.get(key)), None)
    if not isinstance(name, str):
        raise ValueError(f'{where}: no picture; give its path as "image"')
    return Pair(folder / name, texts_of(row), str(row.get("group") or ""), where)


def texts_of(row: Mapping[str, object]) -> dict[str, str | tuple[str, ...]]:
    """The texts among the entries of a row, under their own names, none of them empty."""
    found: dict[str, str | tuple[str, ...]] = {}
    for key, value in row.items():
        kind = ALIASES.get(str(key).lower(), str(key).lower())
        if kind == "tags":
            words = value if isinstance(value, list) else str(value or "").split(",")
            if tags := tuple(str(word).strip() for word in words if str(word).strip()):
                found[kind] = tags
        elif kind in KINDS and isinstance(value, str) and value.strip():
            found.setdefault(kind, value.strip())
    return found


def _webdataset(path: Path) -> list[Pair]:
    groups: dict[str, dict[str, Slice]] = {}
    for member in tar_members(path):
        folder, _, last = member.name.rpartition("/")
        key, _, suffix = last.partition(".")  # a key ends at its first dot
        groups.setdefault(f"{folder}/{key}", {})[f".{suffix.lower()}"] = member
    pairs = []
    for key, members in groups.items():
        image = next((members[suffix] for suffix in SUFFIXES if suffix in members), None)
        where = f"{path}, sample {key.strip('/')!r}"
        if image is None:
            raise ValueError(f"{where}: no picture among {', '.join(members)}")
        row: dict[str, object] = {}
        if ".json" in members:
            try:
                row = json.loads(members[".json"].read())
            except ValueError as problem:
                raise ValueError(f"{where}: its .json cannot be read ({problem})") from None
        if ".txt" in members:
            row = {"raw": members[".txt"].read().decode("utf-8", "replace"), **row}
        pairs.append(Pair(image, texts_of(row), str(row.get("group") or ""), where))
    return pairs


@dataclass(frozen=True)
class TextChoice:
    """Which of its texts a pair is learned by."""

    weights: Mapping[str, float]
    """Kind -> how often it is drawn, relative to the others that the pair has."""

    @staticmethod
    def of(text: str) -> "TextChoice":
        """ "uniform", one kind, or weights as in "raw=1,generated=2"; ValueError for another kind."""
        parts = [part.partition("=") for part in (text if text != "uniform" else ",".join(KINDS)).split(",")]
        try:
            weights = {name.strip(): float(value) if equals else 1.0 for name, equals, value in parts}
        except ValueError:
            raise ValueError(f"weights of texts are numbers, as in raw=1,generated=2; got {text!r}") from None
        if wrong := [name for name in weights if name not in KINDS]:
            raise ValueError(f"there is no text of kind {wrong[0]!r}; the kinds are uniform, {', '.join(KINDS)}")
        if min(weights.values()) < 0 or not sum(weights.values()):
            raise ValueError(f"weights of texts must be 0 or more, and not all 0; got {text!r}")
        return TextChoice(weights)

    def draw(self, pair: Pair, generator: np.random.Generator) -> str:
        """One of the pair's texts; of its tags a random part in random order. Any text where it has none of these."""
        kinds = [kind for kind in self.weights if kind in pair.texts and self.weights[kind]] or list(pair.texts)
        weights = np.array([self.weights.get(kind) or 1.0 for kind in kinds])
        text = pair.texts[kinds[generator.choice(len(kinds), p=weights / weights.sum())]]
        if isinstance(text, str):
            return text
        count = int(generator.integers(1, len(text) + 1))
        return " ".join(text[i] for i in generator.permutation(len(text))[:count])


def all_texts(pairs: Sequence[Pair]) -> list[str]:
    """Every text of every pair, for a vocabulary."""
    return [text if isinstance(text, str) else " ".join(text) for pair in pairs for text in pair.texts.values()]
