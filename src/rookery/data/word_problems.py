"""The word problem of a permutation group: after every element read, say the product so far.

S5 is the smallest symmetric group that is not solvable: no circuit of fixed depth follows it for long (under the usual
conjecture that TC⁰ ≠ NC¹), while one matrix that is multiplied by every element read does.
"""

from dataclasses import dataclass
from functools import cache
from itertools import combinations, permutations

import numpy as np


@cache
def elements(points: int) -> np.ndarray:
    """All permutations of so many points, [points!, points], in lexicographic order: element 0 changes nothing."""
    return np.array(list(permutations(range(points))))


@cache
def generators(points: int) -> np.ndarray:
    """The identity and all swaps of two points, [1 + points (points − 1) / 2, points]."""
    found = [np.arange(points)]
    for i, j in combinations(range(points), 2):
        swap = np.arange(points)
        swap[[i, j]] = j, i
        found.append(swap)
    return np.stack(found)


def index_of(permutation: np.ndarray) -> np.ndarray:
    """Place of permutations [..., points] among `elements`."""
    points = permutation.shape[-1]
    weights = points ** np.arange(points)[::-1]
    return np.searchsorted(elements(points) @ weights, permutation @ weights)


@dataclass(frozen=True, kw_only=True)
class WordProblem:
    """Tokens are the identity and the swaps of S_points; labels, at every position, the product so far."""

    points: int = 5
    length: int = 12

    @property
    def vocab_size(self) -> int:
        """Labels need more ids than tokens: points!"""
        return len(elements(self.points))

    @property
    def chance(self) -> float:
        return 1 / len(elements(self.points))

    def row(self, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        swaps = generators(self.points)
        tokens = generator.integers(len(swaps), size=self.length)
        product, products = swaps[0], []
        for token in tokens:
            product = swaps[token][product]  # first what was there, then the new element
            products.append(product)
        return tokens, index_of(np.stack(products))
