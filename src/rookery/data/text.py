"""Text files as one long row of tokens, and the windows of it that a step learns from."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

END_OF_TEXT = 0
"""Token between documents."""


@dataclass(frozen=True)
class Corpus:
    """Documents as tokens, each followed by END_OF_TEXT."""

    tokens: np.ndarray
    """uint16 or int32 [n]"""
    characters: int
    """Characters of the documents, for losses per character."""


def read_documents(path: Path) -> Iterator[str]:
    """Documents of a file: the whole of a .txt, the "text" of every line of a .jsonl, the strings of a .json list."""
    if not path.exists():
        raise FileNotFoundError(f"there is no text file {str(path)!r}")
    if path.suffix == ".jsonl":
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    yield json.loads(line)["text"]
                except (ValueError, KeyError, TypeError):
                    raise ValueError(f'{path}, line {number}: expected a JSON object with a "text" field') from None
    elif path.suffix == ".json":
        yield from json.loads(path.read_text(encoding="utf-8"))
    else:
        yield path.read_text(encoding="utf-8")


def tokenize(documents: list[str], tokenizer) -> Corpus:
    """All documents in one row; tokens are 16-bit where the vocabulary allows."""
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32
    rows = [np.asarray([*tokenizer.encode(text), END_OF_TEXT], dtype=dtype) for text in documents]
    return Corpus(np.concatenate(rows) if rows else np.empty(0, dtype), sum(map(len, documents)))


def split(documents: list[str], validation_share: float) -> tuple[list[str], list[str]]:
    """Documents to learn from and to hold out. A single document is cut by characters instead."""
    if validation_share == 0 or not documents:
        return documents, []
    if len(documents) == 1:
        cut = round(len(documents[0]) * (1 - validation_share))
        return [documents[0][:cut]], [documents[0][cut:]]
    held = max(1, round(len(documents) * validation_share))
    return documents[:-held], documents[-held:]


class Windows:
    """Windows of a corpus in an order that is a pure function of the seed and the place in the run.

    Every pass over the corpus shifts the windows by a random offset and shuffles them. A resumed run sees what an
    uninterrupted one would have seen.
    """

    def __init__(self, corpus: Corpus, length: int, seed: int) -> None:
        self.tokens, self.length, self.seed = corpus.tokens, length, seed
        # as many windows as fit behind the largest offset, length − 1
        self.per_epoch = (len(self.tokens) - length) // length
        if self.per_epoch < 1:
            raise ValueError(
                f"{len(self.tokens)} tokens of text are too few for windows of {length}: give at least "
                f"{2 * length}, or a smaller data.sequence_length"
            )
        self._epoch, self._offset, self._order = -1, 0, np.empty(0, np.int64)

    def batch(self, step: int, rows: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets, int64 [rows, length], of `step` (from 1)."""
        starts = [self._start((step - 1) * rows + row) for row in range(rows)]
        windows = np.stack([self.tokens[s : s + self.length + 1] for s in starts]).astype(np.int64)
        windows = torch.from_numpy(windows)
        return windows[:, :-1], windows[:, 1:]

    def _start(self, sample: int) -> int:
        epoch, place = divmod(sample, self.per_epoch)
        if epoch != self._epoch:
            generator = np.random.Generator(np.random.Philox(key=self.seed, counter=epoch))
            self._offset = int(generator.integers(self.length))
            self._order = generator.permutation(self.per_epoch)
            self._epoch = epoch
        return int(self._order[place]) * self.length + self._offset


def validation_rows(corpus: Corpus, length: int, most: int = 256) -> tuple[Tensor, Tensor]:
    """Inputs and targets [rows, length] from the start of a held-out corpus, at most `most` rows."""
    count = min(most, (len(corpus.tokens) - 1) // length)
    tokens = torch.from_numpy(corpus.tokens[: count * length + 1].astype(np.int64))
    return tokens[:-1].view(count, length), tokens[1:].view(count, length)
