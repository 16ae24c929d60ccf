"""Documents of unequal length as packed rows: one after the other, each with a state of its own."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rookery.data.jsonl import Sample

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


def shortened(samples: Sequence[Sample], length: int) -> tuple[list[Sample], int]:
    """Samples cut to `length` inputs, without those that then teach nothing; and how many were cut or left out."""
    kept, changed = [], 0
    for sample in samples:
        whole = len(sample.tokens) <= length + 1
        short = sample if whole else Sample(sample.tokens[: length + 1], sample.learned[: length + 1])
        teaches = len(short.tokens) > 1 and short.learned.any()
        changed += not whole or not teaches
        if teaches:
            kept.append(short)
    return kept, changed


class Packs:
    """Batches of whole documents in an order that is a pure function of the seed and the step.

    Every pass shuffles the documents anew and fills each batch with as many as fit into `budget` tokens. A resumed run
    sees what an uninterrupted one would have seen.
    """

    def __init__(self, samples: Sequence[Sample], budget: int, seed: int) -> None:
        """Raises ValueError where a sample is longer than `budget` inputs."""
        self.samples, self.budget, self.seed = samples, budget, seed
        self._lengths = np.array([len(sample.tokens) - 1 for sample in samples])
        if not len(samples) or self._lengths.max() > budget:
            raise ValueError(f"every sample must have 1 to {budget} tokens; got {len(samples)} samples")
        self._batches: list[np.ndarray] = []
        self._epochs = 0

    def indices(self, step: int) -> np.ndarray:
        """Which samples `step` (from 1) learns from, int64."""
        while len(self._batches) < step:
            self._batches += self._epoch(self._epochs)
            self._epochs += 1
        return self._batches[step - 1]

    def batch(self, step: int) -> PackedBatch:
        """The samples of `step` (from 1) in one row."""
        return collate([self.samples[i] for i in self.indices(step)])

    def _epoch(self, epoch: int) -> list[np.ndarray]:
        order = np.random.Generator(np.random.Philox(key=self.seed, counter=epoch)).permutation(len(self.samples))
        batches, first, filled = [], 0, 0
        for place, length in enumerate(self._lengths[order]):
            if filled + length > self.budget:
                batches.append(order[first:place])
                first, filled = place, 0
            filled += length
        return [*batches, order[first:]]
