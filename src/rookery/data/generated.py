"""Rows of made-up tasks: endless, and the same for the same seed, split and row number, whatever the batch size."""

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

UNLABELLED = -100
"""Label of positions that nothing is asked at."""
SPLITS = {"train": 0, "test": 1}


class Task(Protocol):
    """What `rows` draws from: one row at a time."""

    vocab_size: int
    """Ids are 0 to vocab_size − 1, labels included."""
    chance: float
    """Accuracy of a guess."""

    def row(self, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and labels [length]; the answer to a label is due at its own position."""
        ...


def row_generator(seed: int, split: str, number: int) -> np.random.Generator:
    """The generator of one row, independent of all others."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, SPLITS[split], number])))


def rows(task: Task, *, seed: int, first: int, count: int, split: str = "train") -> tuple[Tensor, Tensor]:
    """Tokens and labels, int64 [count, length], of rows `first`, `first` + 1, …"""
    drawn = [task.row(row_generator(seed, split, number)) for number in range(first, first + count)]
    tokens, labels = (torch.from_numpy(np.stack(part).astype(np.int64)) for part in zip(*drawn))
    return tokens, labels
