"""A vocabulary for greedy longest match, made from text: byte-pair merges begin it, use decides.

Byte-pair encoding applies its merges in the order learned; our trie takes the longest piece that fits. A piece that is
a step on the way to a longer one is needed by the first and often never used by the second. So the corpus is split
greedily, and the pieces whose absence would cost least give way to joins of neighbours that would save more.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator

from rookery.errors import MissingDependency
from rookery.tokenizers.byte_level import byte_letters
from rookery.tokenizers.reference import ReferenceTrie
from rookery.tokenizers.vocabulary import write_vocabulary

__all__ = ["characters_per_token", "merge_order_pieces", "train_vocabulary", "write_vocabulary"]

# What a piece may lie in: a contraction's end, a word, one digit, or a run of signs, each with at most one space before
# it; line ends apart from everything else (a blank line must stay a token wherever it stands: stop rules look for it).
_PIECE_BORDERS = r"'(?:s|t|re|ve|m|ll|d)\b| ?[^\W\d_]+| ?\d| ?(?:[^\s\w]|_)+|\n+|[^\S\n]+(?!\S)|\s"
_BYTES = [bytes([byte]) for byte in range(256)]
_ROUNDS = 15
_SHARE = 20  # one piece in so many is exchanged in a round: exchanges disturb each other's estimates


def train_vocabulary(texts: Iterable[str], size: int) -> list[bytes]:
    """At most `size - 1` pieces, ids from 1: the 256 single bytes, then the others, the most used first.

    Id 0 is end of text, so an embedding of `size` rows fits. Pieces that the texts never use are left out: small texts
    give fewer. `texts` is read once. Needs the `tokenizers` package.
    """
    wanted = size - 257
    if wanted < 0:
        raise ValueError(f"a vocabulary of {size} is too small: end of text and the 256 bytes alone make 257.")
    proposed, words = _propose(texts, size - 1)
    best = split = _Split([piece for piece in proposed if len(piece) > 1], words)
    for _ in range(_ROUNDS):
        split = _Split(split.exchange(wanted), words)
        if split.tokens < best.tokens:
            best = split
    # a piece that training never meets would keep its random embedding
    kept = [piece for piece in best.pieces if best.used[piece]]
    return _BYTES + sorted(kept, key=lambda piece: -best.used[piece])


def merge_order_pieces(texts: Iterable[str], size: int) -> list[bytes]:
    """The first `size - 257` byte-pair merges after the 256 bytes: where `train_vocabulary` starts."""
    proposed, _ = _propose(texts, size - 1)
    return _BYTES + [piece for piece in proposed if len(piece) > 1]


def characters_per_token(pieces: Iterable[bytes], texts: Iterable[str]) -> float:
    """Characters of `texts` per token of greedy longest match over `pieces`."""
    trie = ReferenceTrie(dict(enumerate(pieces, start=1)))
    characters = tokens = 0
    for text in texts:
        characters += len(text)
        tokens += len(trie.encode(text.encode("utf-8")))
    return characters / tokens


def _propose(texts: Iterable[str], count: int) -> tuple[list[bytes], Counter[bytes]]:
    """At most `count` byte-level BPE pieces in merge order, and how often each stretch between borders occurs."""
    try:
        from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    except ImportError as error:
        raise MissingDependency("training a vocabulary needs `pip install tokenizers`.") from error
    words: Counter[bytes] = Counter()
    find = re.compile(_PIECE_BORDERS).findall

    def counted() -> Iterator[str]:
        for text in texts:
            words.update(word.encode("utf-8") for word in find(text))
            yield text

    bpe = Tokenizer(models.BPE())
    borders = pre_tokenizers.Split(Regex(_PIECE_BORDERS), "isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [borders, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=count, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(counted(), trainer)
    letters = byte_letters()
    ranked = sorted(bpe.get_vocab().items(), key=lambda item: item[1])
    return [bytes(letters[letter] for letter in piece) for piece, _ in ranked], words


class _Split:
    """The words of a corpus, split by greedy longest match over the bytes and `pieces`."""

    def __init__(self, pieces: list[bytes], words: Counter[bytes]) -> None:
        self.pieces = pieces
        self.tokens = 0
        self.used: Counter[bytes] = Counter()
        self._joins: Counter[bytes] = Counter()  # tokens saved if neighbours became one piece
        ids = dict(enumerate(_BYTES + pieces, start=1))
        self._trie = ReferenceTrie(ids)
        for word, count in words.items():
            parts = [ids[index] for index in self._trie.encode(word)]
            self.tokens += count * len(parts)
            for i, part in enumerate(parts):
                self.used[part] += count
                for joined in (2, 3):
                    if i + joined <= len(parts):
                        self._joins[b"".join(parts[i : i + joined])] += count * (joined - 1)

    def _costs(self) -> dict[bytes, int]:
        """Tokens more without each piece: its place is taken by the longest shorter match and what then follows."""
        known = {*_BYTES, *self.pieces}
        costs = {}
        for piece in self.pieces:
            shorter = next(size for size in range(len(piece) - 1, 0, -1) if piece[:size] in known)
            costs[piece] = self.used[piece] * len(self._trie.encode(piece[shorter:]))
        return costs

    def exchange(self, wanted: int) -> list[bytes]:
        """At most `wanted` pieces: the cheapest replaced by more useful joins, free places filled with joins."""
        costs = sorted(self._costs().items(), key=lambda item: item[1])
        useless = sum(cost == 0 for _, cost in costs)
        joins = self._joins.most_common(wanted - len(costs) + useless + wanted // _SHARE)
        new = [piece for piece, _ in joins[: wanted - len(costs)]]
        gone = set()
        for (piece, saved), (old, cost) in zip(joins[len(new) :], costs):
            if saved <= cost:
                break
            new.append(piece)
            gone.add(old)
        return [piece for piece in self.pieces if piece not in gone] + new
