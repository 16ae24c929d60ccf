"""Tasks of recall: keys and values are read, then asked for (Zoology, arXiv 2312.04927; passkeys of RWKV-X).

Rows come from `rookery.data.generated.rows`. Keys are the ids below half the vocabulary, values those above,
0 is blank.
"""

from dataclasses import dataclass

import numpy as np

from rookery.data.generated import UNLABELLED


def ask(
    tokens: np.ndarray,
    labels: np.ndarray,
    pairs: tuple[np.ndarray, np.ndarray],
    context: int,
    alpha: float,
    generator: np.random.Generator,
) -> None:
    """Asks for every key once after the first `context` tokens, at distances i with weights i^(alpha − 1).

    The label stands on the key itself; the answer is never fed.
    """
    keys, values = pairs
    space = (len(tokens) - context) // 2
    weights = (alpha - 1) * np.log(np.arange(1, space + 1))
    # the largest of weights + Gumbel noise in falling order: successive draws without replacement in one step
    order = np.argsort(-(weights + generator.gumbel(size=space)))[: len(keys)]
    places = context + 2 * order
    tokens[places], labels[places] = keys, values


def fill(tokens: np.ndarray, used: np.ndarray, vocab_size: int, generator: np.random.Generator) -> None:
    """Random ids of the whole vocabulary where nothing stands."""
    noise = generator.integers(vocab_size, size=len(tokens))
    tokens[~used] = noise[~used]


@dataclass(frozen=True, kw_only=True)
class Recall:
    """Multi-query associative recall: `pairs` keys with their values, then each key once."""

    vocab_size: int = 512
    length: int = 64
    """Tokens of a row; even."""
    pairs: int = 8
    alpha: float = 0.01
    """1 spreads the questions evenly; small values put them right behind the list."""
    passes: int = 1
    """Times that the list is read."""
    random_filler: bool = True
    """Random ids between the questions; blanks otherwise, which is much easier."""

    def __post_init__(self) -> None:
        need = 2 * self.pairs * (self.passes + 1)
        if self.length % 2 or self.length < need:
            raise ValueError(f"length {self.length} must be even and at least {need} for {self.pairs} pairs")
        if self.vocab_size <= self.length:
            raise ValueError(f"vocab_size {self.vocab_size} must be larger than length {self.length}")

    @property
    def chance(self) -> float:
        return 1 / (self.vocab_size - self.vocab_size // 2)

    def row(self, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        half, context = self.vocab_size // 2, 2 * self.pairs * self.passes
        keys = 1 + generator.choice(half - 1, self.pairs, replace=False)
        values = half + generator.choice(self.vocab_size - half, self.pairs, replace=False)
        tokens, labels = np.zeros(self.length, np.int64), np.full(self.length, UNLABELLED)
        tokens[:context] = np.tile(np.stack([keys, values], axis=1).ravel(), self.passes)
        ask(tokens, labels, (keys, values), context, self.alpha, generator)
        if self.random_filler:
            used = labels != UNLABELLED
            used[:context] = True
            fill(tokens, used, self.vocab_size, generator)
        return tokens, labels


@dataclass(frozen=True, kw_only=True)
class Overwrite:
    """Recall of keys that are written several times: the last value counts. No value occurs twice in a row."""

    vocab_size: int = 512
    length: int = 64
    keys: int = 4
    writes: int = 16
    """Pairs in the list; every key is written at least once."""
    alpha: float = 0.01

    def __post_init__(self) -> None:
        need = 2 * (self.writes + self.keys)
        if self.length % 2 or self.length < need or self.writes < self.keys:
            raise ValueError(
                f"{self.writes} writes to {self.keys} keys need an even length of at least {need}, got {self.length}, "
                "and a write for every key"
            )

    @property
    def chance(self) -> float:
        return 1 / (self.vocab_size - self.vocab_size // 2)

    @property
    def blind_to_order(self) -> float:
        """Accuracy of a reader that finds a key's values but not which was last: the mean of 1 / writes to a key."""
        extra, keys = self.writes - self.keys, self.keys
        return (1 - (1 - 1 / keys) ** (extra + 1)) * keys / (extra + 1)

    def written(self, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The key ids, and of every write the key's index and the value."""
        half = self.vocab_size // 2
        keys = 1 + generator.choice(half - 1, self.keys, replace=False)
        values = half + generator.choice(self.vocab_size - half, self.writes, replace=False)
        extra = generator.integers(self.keys, size=self.writes - self.keys)
        return keys, np.concatenate([generator.permutation(self.keys), extra]), values

    def row(self, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        keys, who, values = self.written(generator)
        last = np.array([values[np.flatnonzero(who == key)[-1]] for key in range(self.keys)])
        context = 2 * self.writes
        tokens, labels = np.zeros(self.length, np.int64), np.full(self.length, UNLABELLED)
        tokens[:context] = np.stack([keys[who], values], axis=1).ravel()
        ask(tokens, labels, (keys, last), context, self.alpha, generator)
        used = labels != UNLABELLED
        used[:context] = True
        fill(tokens, used, self.vocab_size, generator)
        return tokens, labels


@dataclass(frozen=True, kw_only=True)
class Passkey:
    """One pair somewhere in filler; the last token asks for it."""

    vocab_size: int = 512
    length: int = 256
    depth: float | None = None
    """Place of the pair, from 0 to 1; None draws one for every row."""
    decoys: int = 0
    """Further pairs, of other keys."""

    @property
    def chance(self) -> float:
        return 1 / (self.vocab_size - self.vocab_size // 2)

    def row(self, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        half, end = self.vocab_size // 2, self.length - 4
        keys = 1 + generator.choice(half - 1, 1 + self.decoys, replace=False)
        values = half + generator.choice(self.vocab_size - half, 1 + self.decoys, replace=False)
        depth = generator.random() if self.depth is None else self.depth
        place = round(depth * end) // 2 * 2
        tokens = generator.integers(self.vocab_size, size=self.length)
        # the pairs' own ids must stand nowhere else
        while (taken := np.isin(tokens, [*keys, *values])).any():
            tokens[taken] = generator.integers(self.vocab_size, size=taken.sum())
        free = np.setdiff1d(np.arange(0, end + 1, 2), [place])
        places = [place, *generator.choice(free, self.decoys, replace=False)]
        for at, key, value in zip(places, keys, values, strict=True):
            tokens[at : at + 2] = key, value
        labels = np.full(self.length, UNLABELLED)
        tokens[-1], labels[-1] = keys[0], values[0]
        return tokens, labels


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Facts of one token each, (name, value), among noise; a name's own token asks for its value.

    A row has one value per name. Ids: 0 … names − 1 ask, then the facts, name by name, then values, then noise.
    """

    names: int = 128
    values: int = 4
    noise_ids: int = 32
    length: int = 128
    told: float = 0.6
    """Share of places where a fact stands."""
    asked: float = 0.3
    """Share of places where a name that was told is asked for; 0 for the last place only, which then asks for a fact
    that stands once in the row."""
    depth: float | None = None
    """Place of that fact, from 0 to 1; None draws one for every row."""

    def __post_init__(self) -> None:
        if self.length < 4 or self.told <= 0 or self.asked < 0 or self.told + self.asked > 1:
            raise ValueError(
                f"length ({self.length}) must be at least 4, told ({self.told}) above 0 and told + asked at most 1"
            )

    @property
    def vocab_size(self) -> int:
        return self.names * (1 + self.values) + self.values + self.noise_ids

    @property
    def chance(self) -> float:
        return 1 / self.values

    def row(self, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        book = generator.integers(self.values, size=self.names)
        facts = self.names + self.values * np.arange(self.names) + book
        answers = self.names * (1 + self.values) + book
        tokens = generator.integers(self.vocab_size - self.noise_ids, self.vocab_size, self.length)
        labels = np.full(self.length, UNLABELLED)
        which = generator.integers(0 if self.asked else 1, self.names, self.length)  # fact 0 is the single one
        kind = generator.random(self.length)
        told = kind < self.told
        tokens[told] = facts[which[told]]
        if not self.asked:
            depth = generator.random() if self.depth is None else self.depth
            tokens[round(depth * (self.length - 2))] = facts[0]
            tokens[-1], labels[-1] = 0, answers[0]
            # name 0 is special nowhere else: names change places
            return self._renamed(tokens, labels, generator)
        known = np.flatnonzero(told)
        for at in np.flatnonzero((kind >= self.told) & (kind < self.told + self.asked)):
            if before := int(np.searchsorted(known, at)):
                name = which[known[generator.integers(before)]]
                tokens[at], labels[at] = name, answers[name]
        return tokens, labels

    def _renamed(
        self, tokens: np.ndarray, labels: np.ndarray, generator: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        new = generator.permutation(self.names)
        facts = self.names + self.values * new[:, None] + np.arange(self.values)
        rest = np.arange(self.names * (1 + self.values), self.vocab_size)
        return np.concatenate([new, facts.ravel(), rest])[tokens], labels
