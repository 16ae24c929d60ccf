import pytest
from support.data import shared

from rookery.tokenizers.reference import ReferenceTrie
from rookery.tokenizers.train import (
    characters_per_token,
    merge_order_pieces,
    train_vocabulary,
    write_vocabulary,
)
from rookery.tokenizers.vocabulary import parse_vocabulary

NAMES = ["Tom", "Lily", "Max", "Zoë", "Anna", "Ben"]
THINGS = ["ball", "boat", "garden", "balloon", "kite", "café"]
STORIES = [
    f'Once upon a time, {name} had {n} red {thing}s.\n"It\'s my {thing}!" said {name}.\n\nThey played all day.'
    for name in NAMES
    for n, thing in enumerate(THINGS)
]


def test_vocabulary_has_the_bytes_first_and_no_more_pieces_than_asked_for():
    pieces = train_vocabulary(STORIES, 280)
    assert 270 < len(pieces) <= 279  # id 0 is end of text
    assert pieces[:256] == [bytes([byte]) for byte in range(256)]
    assert len(set(pieces)) == len(pieces)


def test_pieces_are_words_with_their_space_and_never_join_lines_to_words():
    pieces = train_vocabulary(STORIES, 400)[256:]
    assert b" said" in pieces
    assert b"\n\n" in pieces
    assert all(piece.strip(b"\n") == b"" for piece in pieces if b"\n" in piece)
    assert all(b" " not in piece[1:] for piece in pieces)


def test_most_used_pieces_come_first():
    pieces = train_vocabulary(STORIES, 400)
    assert len(pieces) < 399  # the rest would never be used
    trie = ReferenceTrie(dict(enumerate(pieces, start=1)))
    ids = [index for story in STORIES for index in trie.encode(story.encode())]
    uses = [ids.count(index) for index in range(257, len(pieces) + 1)]
    assert uses == sorted(uses, reverse=True)
    assert uses[-1] > 0


def test_small_text_gives_fewer_pieces_instead_of_useless_ones():
    assert 257 <= len(train_vocabulary(["a cat, a cat"], 4096)) < 300


def test_texts_may_be_a_generator():
    assert train_vocabulary((s for s in STORIES), 300) == train_vocabulary(STORIES, 300)


def test_vocabulary_smaller_than_the_bytes_is_refused():
    with pytest.raises(ValueError, match="a vocabulary of 256 is too small"):
        train_vocabulary(STORIES, 256)


def test_written_vocabulary_reads_back(tmp_path):
    pieces = train_vocabulary(STORIES, 400)
    write_vocabulary(pieces, tmp_path / "vocab.txt")
    assert parse_vocabulary((tmp_path / "vocab.txt").read_bytes()) == dict(enumerate(pieces, start=1))


@pytest.mark.data
def test_pieces_chosen_by_use_beat_merge_order_on_unseen_text():
    speeches = shared("text/tinyshakespeare.txt").read_text(encoding="utf-8").split("\n\n")
    known, unseen = speeches[::3], speeches[1::30]
    by_use = characters_per_token(train_vocabulary(known, 1024), unseen)
    by_order = characters_per_token(merge_order_pieces(known, 1024), unseen)
    assert by_use > by_order
