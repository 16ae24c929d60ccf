"""ROSA, the definition: what followed the latest of the longest earlier matches of the text so far (core.md 1.8).

Plain Python over sequences of symbols; every faster form must agree with it.
"""

from collections.abc import Hashable, Sequence


def rosa_qkv(q: Sequence[Hashable], k: Sequence[Hashable], v: Sequence[Hashable]) -> list:
    """For every i, v[j + 1] for the j < i with the longest common suffix of q[..i] and k[..j], the latest such j.

    −1 where not even one symbol matches. Their lengths by recurrence: c(i, j) = (q[i] = k[j]) (c(i−1, j−1) + 1).
    """
    found, before = [], [0] * len(k)
    for i, symbol in enumerate(q):
        common = [before[j - 1] * (j > 0) + 1 if k[j] == symbol else 0 for j in range(len(k))]
        best = max(range(i), key=lambda j: (common[j], j), default=None)
        found.append(v[best + 1] if best is not None and common[best] else -1)
        before = common
    return found


def rosa(x: Sequence[Hashable]) -> list:
    """What followed the latest earlier occurrence of the longest suffix of x[..i] that occurred before."""
    return rosa_qkv(x, x, x)
