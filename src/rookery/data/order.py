"""Which window of the data a sample is: pure functions of its number, so that a resumed run is exact."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np


class Order(Protocol):
    """Sample number (from 0) -> the token at which its window begins."""

    def start(self, sample: int) -> int: ...


class Shuffled:
    """Every pass over the data shifts the windows by a random offset and shuffles them."""

    def __init__(self, tokens: int, length: int, seed: int) -> None:
        """ValueError where there is not enough for one window at any offset."""
        self.length, self.seed = length, seed
        # as many windows as fit behind the largest offset, length − 1
        self.per_epoch = (tokens - length) // length
        if self.per_epoch < 1:
            raise ValueError(
                f"{tokens} tokens of text are too few for windows of {length}: give at least "
                f"{2 * length}, or a smaller data.sequence_length"
            )
        self._epoch, self._offset, self._order = -1, 0, np.empty(0, np.int64)

    def start(self, sample: int) -> int:
        epoch, place = divmod(sample, self.per_epoch)
        if epoch != self._epoch:
            generator = np.random.Generator(np.random.Philox(key=self.seed, counter=epoch))
            self._offset = int(generator.integers(self.length))
            self._order = generator.permutation(self.per_epoch)
            self._epoch = epoch
        return int(self._order[place]) * self.length + self._offset


class Permuted:
    """Every pass over `count` items takes them in a random order of its own."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def item(self, sample: int) -> int:
        """The item that sample number `sample` (from 0) is."""
        epoch, place = divmod(sample, self.count)
        if epoch != self._epoch:
            generator = np.random.Generator(np.random.Philox(key=self.seed, counter=epoch))
            self._epoch, self._order = epoch, generator.permutation(self.count)
        return int(self._order[place])


class Official:
    """RWKV-LM's order (core.md 1.10): window (φ s³ mod p), s = 1, 2, 3 …, for a prime p ≡ 2 (mod 3).

    Cubing is a bijection modulo such a prime, so a pass of p samples sees p windows once each.
    """

    def __init__(self, tokens: int, length: int) -> None:
        self.length = length
        self.prime = magic_prime(tokens, length)
        self.factor = int(self.prime * (5**0.5 - 1) / 2)

    def start(self, sample: int) -> int:
        return self.factor * (sample + 1) ** 3 % self.prime * self.length


def magic_prime(tokens: int, length: int) -> int:
    """The largest prime ≡ 2 (mod 3) not above ⌊tokens / length⌋ − 1."""
    slots = tokens // length
    for candidate in range(slots - 1, 1, -1):
        if candidate % 3 == 2 and _is_prime(candidate):
            return candidate
    raise ValueError(
        f"{tokens} tokens of text are too few for windows of {length} in the official order: give at least "
        f"{3 * length}, or a smaller data.sequence_length"
    )


def _is_prime(n: int) -> bool:
    """By Miller and Rabin, exact below 3 · 10^24 with these bases."""
    bases = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41)
    if n in bases:
        return True
    if n < 2 or not all(n % p for p in bases):
        return False
    odd, halvings = n - 1, 0
    while odd % 2 == 0:
        odd, halvings = odd // 2, halvings + 1
    for base in bases:
        x = pow(base, odd, n)
        if x in (1, n - 1):
            continue
        for _ in range(halvings - 1):
            x = x * x % n
            if x == n - 1:
                break
        else:
            return False
    return True


class Mixture:
    """Which source a sample is from, by weights, and the how manieth of that source it is.

    Every thousand samples hold each source by its exact share (rounded to a thousandth), in a random order.
    """

    BLOCK = 1000

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        """ValueError unless the weights are above 0."""
        shares = np.asarray(weights, np.float64)
        if not len(shares) or not np.isfinite(shares).all() or (shares <= 0).any():
            raise ValueError(f"weights of data must be numbers above 0, got {list(weights)}")
        shares = shares / shares.sum() * self.BLOCK
        self.counts = np.floor(shares).astype(np.int64)
        missing = self.BLOCK - int(self.counts.sum())
        self.counts[np.argsort(self.counts - shares, kind="stable")[:missing]] += 1  # largest remainders
        self.seed, self._block = seed, -1

    def source(self, sample: int) -> tuple[int, int]:
        """Source of sample number `sample` (from 0), and its number within that source (from 0)."""
        block, place = divmod(sample, self.BLOCK)
        if block != self._block:
            generator = np.random.Generator(np.random.Philox(key=self.seed + (1 << 32), counter=block))
            self._sources = generator.permutation(np.repeat(np.arange(len(self.counts)), self.counts))
            self._block = block
        source = int(self._sources[place])
        return source, block * int(self.counts[source]) + int((self._sources[:place] == source).sum())


def mixture(weights: Sequence[float], sources: int, seed: int) -> Mixture | None:
    """The mixture of so many sources, None where no weights are given; ValueError where they are not one a source."""
    if not weights:
        return None
    if len(weights) != sources:
        raise ValueError(f"data.weights has {len(weights)} numbers for {sources} paths; give one for each")
    return Mixture(weights, seed)
