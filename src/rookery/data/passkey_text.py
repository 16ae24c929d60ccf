"""Passkeys in made-up text, for models that read bytes: filler, `the key of NAME is 48213.`, filler, the question.

The words are made of syllables, so that nothing a model may have learned elsewhere helps. The filler alone serves as
text for runs that must not need any data.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np

from rookery.data.generated import UNLABELLED


@cache
def words(count: int = 200, seed: int = 0) -> tuple[str, ...]:
    """Different lower-case words of one to three syllables, the same every time."""
    generator = np.random.Generator(np.random.Philox(seed))
    found: dict[str, None] = {}
    while len(found) < count:
        syllables = generator.integers(1, 4)
        word = "".join(generator.choice([*"bdfghklmnprstvwz"]) + generator.choice([*"aeiou"]) for _ in range(syllables))
        found[word + generator.choice(["", "n"])] = None
    return tuple(found)


NAMES = tuple(word.capitalize() for word in words(216)[200:])
"""Whose keys are told; none is a word of the filler."""


def filler(characters: int, generator: np.random.Generator) -> str:
    """Sentences of 8 to 12 words, one a line, of exactly so many characters."""
    text: list[str] = []
    length = 0
    while length < characters:
        line = " ".join(generator.choice(words(), generator.integers(8, 13))) + ".\n"
        text.append(line)
        length += len(line)
    return "".join(text)[:characters]


@dataclass(frozen=True, kw_only=True)
class PasskeyText:
    """A needle in filler; labels stand where the digits of the answer are due, the byte before each of them."""

    length: int = 512
    """Bytes of a row, question and answer included."""
    depth: float | None = None
    """Place of the needle asked for, from 0 to 1; None draws one for every row."""
    digits: int = 5
    needles: int = 1
    """Needles of different names; the first is asked for."""
    vocab_size: int = 256
    chance: float = 0.1
    """Of one digit."""

    def row(self, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        names = generator.choice(NAMES, self.needles, replace=False)
        codes = ["".join(map(str, generator.integers(10, size=self.digits))) for _ in names]
        needles = [f"the key of {name} is {code}.\n" for name, code in zip(names, codes)]
        question = f"the key of {names[0]} is {codes[0]}"
        hay = filler(self.length - sum(map(len, needles)) - len(question) - 1, generator) + "\n"
        depths = [self.depth if self.depth is not None else generator.random(), *generator.random(self.needles - 1)]
        ends = np.array([0, *(i + 1 for i, letter in enumerate(hay) if letter == "\n")])
        places = [int(ends[np.abs(ends - depth * len(hay)).argmin()]) for depth in depths]
        for place, needle in sorted(zip(places, needles), reverse=True):
            hay = hay[:place] + needle + hay[place:]
        tokens = np.frombuffer((hay + question).encode(), np.uint8).astype(np.int64)
        labels = np.full(len(tokens), UNLABELLED)
        labels[-self.digits - 1 : -1] = tokens[-self.digits :]
        return tokens, labels
