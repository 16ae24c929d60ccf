"""Text as one long row of tokens, and what of it a step learns from: windows, or whole documents packed."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rookery.data.binidx import BinIdx
from rookery.data.binidx import is_binidx as is_binidx
from rookery.data.documents import END_OF_TEXT as END_OF_TEXT
from rookery.data.documents import read_documents as read_documents
from rookery.data.documents import split as split
from rookery.data.jsonl import Sample
from rookery.data.order import Official, Shuffled, mixture
from rookery.data.packing import PackedBatch, Packs, collate
from rookery.tokenizers import Tokenizer


@dataclass(frozen=True)
class Corpus:
    """Documents as tokens, each followed by END_OF_TEXT."""

    tokens: np.ndarray
    """uint16 or int32 [n]"""
    characters: int = 0
    """Characters of the documents, for losses per character; 0 where unknown."""
    lengths: np.ndarray | None = None
    """int [documents]: tokens of each, where known; else documents end with each END_OF_TEXT."""

    def document_lengths(self) -> np.ndarray:
        if self.lengths is not None:
            return self.lengths
        ends = np.flatnonzero(self.tokens == END_OF_TEXT) + 1
        if not len(ends) or ends[-1] < len(self.tokens):
            ends = np.append(ends, len(self.tokens))
        return np.diff(ends, prepend=0)


def tokenize(documents: list[str], tokenizer: Tokenizer) -> Corpus:
    """All documents in one row; tokens are 16-bit where the vocabulary allows."""
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32
    rows = [np.asarray([*tokenizer.encode(text), END_OF_TEXT], dtype=dtype) for text in documents]
    return Corpus(np.concatenate(rows) if rows else np.empty(0, dtype), sum(map(len, documents)))


def open_tokens(path: str, vocab_size: int, validation_share: float) -> tuple[Corpus, Corpus]:
    """Documents of a binidx data set to learn from and to hold out, these from its end.

    ValueError where it was made with another vocabulary, as far as its first and last tokens tell.
    """
    data = BinIdx(path)
    seen = [int(part.max()) for part in (data.tokens[: 1 << 20], data.tokens[-(1 << 20) :]) if len(part)]
    if seen and max(seen) >= vocab_size:
        raise ValueError(
            f"{path} holds the token {max(seen)}, the tokenizer has {vocab_size}; give the one it was made with"
        )
    held = min(len(data) - 1, max(1, round(len(data) * validation_share))) if validation_share else 0
    cut = len(data) - held
    border = int(data.sizes[:cut].sum(dtype=np.int64))
    ordered = np.array_equal(data.starts, np.cumsum(data.sizes, dtype=np.int64) - data.sizes)
    if not ordered:
        raise ValueError(f"{path}: the sequences do not follow one another in the .bin file; build it anew")
    return (
        Corpus(data.tokens[:border], lengths=data.sizes[:cut]),
        Corpus(data.tokens[border:], lengths=data.sizes[cut:]),
    )


class Windows:
    """Windows of corpora in an order that is a pure function of the seed and the place in the run.

    A resumed run sees what an uninterrupted one would have seen.
    """

    def __init__(
        self,
        corpora: Corpus | Sequence[Corpus],
        length: int,
        seed: int,
        order: str = "shuffle",
        weights: Sequence[float] = (),
    ) -> None:
        """`order` is "shuffle" or "official"; `weights`, one a corpus, say how often each is drawn from (by size)."""
        self.corpora = [corpora] if isinstance(corpora, Corpus) else list(corpora)
        self.length = length
        sizes = [len(corpus.tokens) for corpus in self.corpora]
        self.orders = [Official(n, length) if order == "official" else Shuffled(n, length, seed) for n in sizes]
        self.mixture = mixture(weights or sizes, len(sizes), seed) if len(sizes) > 1 or weights else None

    def batch(self, step: int, rows: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets, int64 [rows, length], of `step` (from 1)."""
        windows = np.stack([self._window((step - 1) * rows + row) for row in range(rows)])
        windows = torch.from_numpy(windows)
        return windows[:, :-1], windows[:, 1:]

    def _window(self, sample: int) -> np.ndarray:
        source, number = self.mixture.source(sample) if self.mixture else (0, sample)
        start = self.orders[source].start(number)
        return self.corpora[source].tokens[start : start + self.length + 1].astype(np.int64)


class PackedDocuments:
    """Whole documents, as many as fit into a step, each with a state of its own; longer ones in pieces."""

    def __init__(
        self, corpora: Sequence[Corpus], length: int, budget: int, seed: int, weights: Sequence[float] = ()
    ) -> None:
        """No piece has more than `length` inputs, no step more than `budget`; `weights`, one a corpus: see `Packs`."""
        self.corpora = list(corpora)
        found = [_pieces(corpus, length) for corpus in self.corpora]
        counts = [len(starts) for starts, _ in found]
        self.starts, self.inputs = (np.concatenate(parts) for parts in zip(*found))
        self.sources = np.repeat(np.arange(len(found)), counts)
        self.packs = Packs(self.inputs, budget, seed, counts, weights)

    def samples(self, step: int) -> list[Sample]:
        """Documents of `step` (from 1)."""
        found = []
        for i in self.packs.indices(step):
            tokens = self.corpora[self.sources[i]].tokens[self.starts[i] : self.starts[i] + self.inputs[i] + 1]
            tokens = tokens.astype(np.int64)
            found.append(Sample(tokens, np.ones(len(tokens), bool)))
        return found

    def batch(self, step: int) -> PackedBatch:
        return collate(self.samples(step))


def _pieces(corpus: Corpus, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Where each piece begins, and how many inputs it has."""
    lengths = corpus.document_lengths().astype(np.int64)
    starts = np.cumsum(lengths) - lengths
    # the last token is a target only; a piece begins where the one before ends, with its last target
    pieces = np.maximum(0, -(-(lengths - 1) // length))
    first = np.repeat(np.cumsum(pieces) - pieces, pieces)
    within = (np.arange(int(pieces.sum())) - first) * length
    return np.repeat(starts, pieces) + within, np.minimum(length, np.repeat(lengths, pieces) - 1 - within)


def validation_rows(corpus: Corpus, length: int, most: int = 256) -> tuple[Tensor, Tensor]:
    """Inputs and targets [rows, length] from the start of a held-out corpus, at most `most` rows."""
    count = min(most, (len(corpus.tokens) - 1) // length)
    tokens = torch.from_numpy(corpus.tokens[: count * length + 1].astype(np.int64))
    return tokens[:-1].view(count, length), tokens[1:].view(count, length)
