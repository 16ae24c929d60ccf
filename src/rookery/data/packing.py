"""Documents of unequal length as packed rows: one after the other, each with a state of its own."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rookery.data.jsonl import Sample
from rookery.data.order import Permuted, mixture

IGNORED = -100
"""Target that no loss counts."""


class PackedBatch(NamedTuple):
    """What one step learns from."""

    inputs: Tensor
    """int64 [1, n]"""
    targets: Tensor
    """int64 [1, n], the token that follows, IGNORED where it is not learned"""
    cu_seqlens: Tensor
    """int64 [documents + 1]: document i is inputs[:, cu_seqlens[i]:cu_seqlens[i + 1]]"""


def collate(samples: Sequence[Sample]) -> PackedBatch:
    """The samples in one row. The last token of each is a target only, so that nothing predicts across a border."""
    inputs = np.concatenate([sample.tokens[:-1] for sample in samples])
    targets = np.concatenate([np.where(s.learned[1:], s.tokens[1:], IGNORED) for s in samples])
    ends = np.cumsum([0, *(len(sample.tokens) - 1 for sample in samples)])
    return PackedBatch(*(torch.from_numpy(array) for array in (inputs[None], targets[None], ends)))


def divided(weights: Sequence[float], parts: int) -> list[list[int]]:
    """Documents by index, in their order, as `parts` runs of about equal weight.

    Where there are fewer documents than parts, some parts are empty.
    """
    total = float(sum(weights)) or 1.0
    found: list[list[int]] = [[] for _ in range(parts)]
    before = 0.0
    for i, weight in enumerate(weights):
        found[min(parts - 1, int((before + weight / 2) / total * parts))].append(i)
        before += weight
    return found


def parted(batch: PackedBatch, parts: int) -> list[tuple[PackedBatch, float]]:
    """A batch as `parts` batches, each with its share of the learned tokens.

    Where there are fewer documents than parts, some get a document whose share is 0.
    """
    ends = batch.cu_seqlens.tolist()
    found = []
    total = int((batch.targets != IGNORED).sum())
    for run in divided([b - a for a, b in zip(ends, ends[1:])], parts):
        first, last = (run[0], run[-1] + 1) if run else (0, 1)
        begin, end = ends[first], ends[last]
        part = PackedBatch(
            batch.inputs[:, begin:end], batch.targets[:, begin:end], batch.cu_seqlens[first : last + 1] - begin
        )
        learned = int((part.targets != IGNORED).sum()) if run else 0
        found.append((part, learned / total))
    return found


def fitted(samples: Sequence[Sample], length: int) -> tuple[list[Sample], int]:
    """Samples of at most `length` inputs; and how many lost something.

    Texts that are learned whole are cut into pieces, each of which begins where the one before ends. Of conversations
    the beginning stays; those that then teach nothing are left out.
    """
    kept, changed = [], 0
    for sample in samples:
        tokens, learned = sample.tokens, sample.learned
        if len(tokens) > length + 1 and learned[1:].all():
            starts = range(0, len(tokens) - 1, length)
            kept += [Sample(tokens[i : i + length + 1], learned[i : i + length + 1]) for i in starts]
            continue
        short = Sample(tokens[: length + 1], learned[: length + 1])
        teaches = bool(short.learned[1:].any())
        changed += len(tokens) > length + 1 or not teaches
        if teaches:
            kept.append(short)
    return kept, changed


class Packs:
    """Which documents each step learns from, in an order that is a pure function of the seed and the step.

    Every pass shuffles the documents anew and fills each batch with as many as fit into `budget` tokens. A resumed run
    sees what an uninterrupted one would have seen.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        budget: int,
        seed: int,
        sources: Sequence[int] = (),
        weights: Sequence[float] = (),
    ) -> None:
        """`lengths` are the documents' tokens; ValueError where there are none or one is longer than `budget`.

        With `weights`, `sources` says how many of the documents, in their order, are of each source; a source's weight
        is its share of the documents that are drawn, and a pass draws as many as there are.
        """
        self.budget, self.seed = budget, seed
        self._lengths = np.array(lengths, np.int64)
        self._mixture = mixture(weights, len(sources), seed)
        self._firsts = np.cumsum([0, *sources])
        self._orders = [Permuted(count, seed) for count in sources]
        if not len(lengths) or self._lengths.max() > budget:
            raise ValueError(f"documents need 1 to {budget} tokens each, and there must be one; got {len(lengths)}")
        self._batches: list[np.ndarray] = []
        self._epochs = 0

    def indices(self, step: int) -> np.ndarray:
        """Which documents `step` (from 1) learns from, int64."""
        while len(self._batches) < step:
            self._batches += self._epoch(self._epochs)
            self._epochs += 1
        return self._batches[step - 1]

    def _order(self, epoch: int) -> np.ndarray:
        total = len(self._lengths)
        if self._mixture is None:
            return np.random.Generator(np.random.Philox(key=self.seed, counter=epoch)).permutation(total)
        drawn = (self._mixture.source(number) for number in range(epoch * total, (epoch + 1) * total))
        return np.array([self._firsts[source] + self._orders[source].item(number) for source, number in drawn])

    def _epoch(self, epoch: int) -> list[np.ndarray]:
        order = self._order(epoch)
        batches, first, filled = [], 0, 0
        for place, length in enumerate(self._lengths[order]):
            if filled + length > self.budget:
                batches.append(order[first:place])
                first, filled = place, 0
            filled += length
        return [*batches, order[first:]]
