"""How good generated pictures are: Fréchet distance of features, and whether they show what was asked for.

The distance depends on the features. It is FID with those of Inception only; none of the figures here are.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Features = Callable[[np.ndarray], np.ndarray]
"""Pictures [n, ...] -> float64 [n, f]."""


def fd_score(real: np.ndarray, generated: np.ndarray) -> float:
    """Fréchet distance of two normal distributions with the mean and covariance of features [n, f] and [m, f].

    ValueError for fewer than two rows, or other features.
    """
    if (
        real.ndim != 2
        or generated.ndim != 2
        or real.shape[1] != generated.shape[1]
        or min(len(real), len(generated)) < 2
    ):
        raise ValueError(f"features must be [2 or more, f] on both sides, got {real.shape} and {generated.shape}")
    (mean, cov), (other_mean, other_cov) = (
        (x.mean(axis=0), np.atleast_2d(np.cov(x, rowvar=False))) for x in (real, generated)
    )
    # trace of the root of the product, from the eigenvalues of a symmetric matrix that has the same ones
    values, vectors = np.linalg.eigh(cov)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    common = np.linalg.eigvalsh(root @ other_cov @ root)
    distance = np.square(mean - other_mean).sum() + np.trace(cov) + np.trace(other_cov)
    return float(max(0.0, distance - 2 * np.sqrt(common.clip(min=0)).sum()))


@dataclass(frozen=True)
class Principal:
    """The first principal components of some pictures, as features."""

    mean: np.ndarray
    axes: np.ndarray
    """[pixels, f]"""

    @staticmethod
    def of(pictures: np.ndarray, components: int = 20) -> "Principal":
        """Components of pictures [n, ...], of as many as there are at most."""
        flat = pictures.reshape(len(pictures), -1).astype(np.float64)
        mean = flat.mean(axis=0)
        _, vectors = np.linalg.eigh(np.cov(flat, rowvar=False))
        return Principal(mean, vectors[:, ::-1][:, :components])

    def __call__(self, pictures: np.ndarray) -> np.ndarray:
        return (pictures.reshape(len(pictures), -1) - self.mean) @ self.axes


@dataclass(frozen=True)
class Neighbours:
    """Names pictures by the majority of their nearest among labelled ones."""

    pictures: np.ndarray
    """[n, pixels]"""
    labels: np.ndarray
    """int [n]"""
    count: int = 5

    @staticmethod
    def of(pictures: np.ndarray, labels: np.ndarray, count: int = 5) -> "Neighbours":
        """Neighbours among pictures [n, ...]."""
        return Neighbours(pictures.reshape(len(pictures), -1).astype(np.float64), labels, count)

    def __call__(self, pictures: np.ndarray) -> np.ndarray:
        """int [m]; of labels with as many neighbours the smallest."""
        flat = pictures.reshape(len(pictures), -1).astype(np.float64)
        # the squared length of what is named is the same for all its neighbours
        distances = np.square(self.pictures).sum(axis=1) - 2 * flat @ self.pictures.T
        nearest = self.labels[np.argpartition(distances, self.count, axis=1)[:, : self.count]]
        votes = (nearest[:, :, None] == np.arange(self.labels.max() + 1)).sum(axis=1)
        return votes.argmax(axis=1)


def prompt_accuracy(generated: np.ndarray, asked: np.ndarray, classify: Callable[[np.ndarray], np.ndarray]) -> float:
    """Share of the pictures [n, ...] that a classifier takes for what was asked for, int [n]."""
    if len(generated) != len(asked):
        raise ValueError(f"there are {len(generated)} pictures and {len(asked)} prompts")
    return float((classify(generated) == asked).mean())
