"""Text becomes tokens, tokens become windows in a reproducible order."""

import json

import numpy as np
import pytest

from rookery.data.text import (
    END_OF_TEXT,
    Corpus,
    PackedDocuments,
    Windows,
    read_documents,
    split,
    tokenize,
    validation_rows,
)


class Letters:
    """One token per character."""

    vocab_size = 256

    def encode(self, text):
        return [ord(c) for c in text]


def test_files_of_every_kind_give_their_documents(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    (tmp_path / "c.json").write_text(json.dumps(["one", "two"]))
    assert list(read_documents(tmp_path / "a.txt")) == ["one\n\ntwo"]
    assert list(read_documents(tmp_path / "b.jsonl")) == list(read_documents(tmp_path / "c.json")) == ["one", "two"]


def test_a_broken_line_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{"body": "two"}\n')
    with pytest.raises(ValueError, match='line 2: expected a JSON object with a "text" field'):
        list(read_documents(path))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no text file .*nowhere\.txt"):
        list(read_documents(tmp_path / "nowhere.txt"))


def test_documents_end_with_the_end_of_text():
    corpus = tokenize(["ab", "c"], Letters())
    assert corpus.tokens.tolist() == [97, 98, END_OF_TEXT, 99, END_OF_TEXT]
    assert corpus.characters == 3


def test_the_held_out_part_is_the_end():
    assert split(["a", "b", "c"], 0.3) == (["a", "b"], ["c"])
    assert split(["abcdefghij"], 0.2) == (["abcdefgh"], ["ij"])
    assert split(["a", "b"], 0) == (["a", "b"], [])


def numbered(count):
    return Corpus(np.arange(count, dtype=np.int32), count)


def test_targets_are_the_next_tokens():
    inputs, targets = Windows(numbered(1000), 10, seed=0).batch(step=3, rows=4)
    assert inputs.shape == targets.shape == (4, 10)
    assert (targets == inputs + 1).all()


def test_a_pass_visits_every_window_once():
    windows = Windows(numbered(1000), 10, seed=0)
    starts = [int(windows.batch(step, 1)[0][0, 0]) for step in range(1, windows.orders[0].per_epoch + 1)]
    offset = min(starts) % 10
    assert sorted(starts) == [offset + 10 * i for i in range(windows.orders[0].per_epoch)]


def test_passes_differ_in_order_and_offset():
    windows = Windows(numbered(1000), 10, seed=0)
    passes = [windows.batch(step, windows.orders[0].per_epoch)[0][:, 0].tolist() for step in (1, 2)]
    assert passes[0] != passes[1]
    assert passes[0][0] % 10 != passes[1][0] % 10


def test_the_order_is_a_pure_function_of_the_step():
    straight, resumed = Windows(numbered(500), 10, seed=1), Windows(numbered(500), 10, seed=1)
    rows = [straight.batch(step, 3)[0] for step in range(1, 60)]
    for step in (59, 1, 30):  # any order of asking
        assert (resumed.batch(step, 3)[0] == rows[step - 1]).all()
    assert (Windows(numbered(500), 10, seed=2).batch(1, 3)[0] != rows[0]).any()


def test_too_little_text_is_refused_with_the_number_needed():
    with pytest.raises(ValueError, match="19 tokens of text are too few for windows of 10: give at least 20"):
        Windows(numbered(19), 10, seed=0)
    for seed in range(20):  # whatever the offset
        assert Windows(numbered(20), 10, seed).batch(1, 1)[1].shape == (1, 10)


def test_validation_rows_are_consecutive():
    inputs, targets = validation_rows(numbered(35), 10)
    assert inputs[:, 0].tolist() == [0, 10, 20]
    assert (targets == inputs + 1).all()


def test_packed_documents_never_cross_a_border_and_are_all_seen_once_a_pass():
    documents = [b"abcdefghijk\0", b"xy\0", b"\0", b"pqrst\0"]
    tokens = np.frombuffer(b"".join(documents), np.uint8).astype(np.uint16)
    packed = PackedDocuments([Corpus(tokens)], length=4, budget=8, seed=0)
    seen = []
    for step in range(1, 10):
        batch = packed.batch(step)
        assert batch.inputs.shape[1] <= 8
        ends = batch.cu_seqlens.tolist()
        for a, b in zip(ends, ends[1:]):
            seen.append((bytes(batch.inputs[0, a:b].tolist()), bytes(batch.targets[0, a:b].tolist())))
    pieces = {
        (b"abcd", b"bcde"),
        (b"efgh", b"fghi"),
        (b"ijk", b"jk\0"),
        (b"xy", b"y\0"),
        (b"pqrs", b"qrst"),
        (b"t", b"\0"),
    }
    assert set(seen) == pieces
    assert len(set(seen[:6])) == 6


def test_sources_are_mixed_by_their_weights():
    corpora = [Corpus(np.full(400, value, np.uint16)) for value in (1, 2)]
    windows = Windows(corpora, 8, seed=0, weights=[3, 1])
    inputs, _ = windows.batch(1, 1000)
    assert (inputs[:, 0] == 1).sum() == 750


def test_packed_documents_of_several_sources_are_mixed_by_their_weights():
    corpora = [Corpus(np.full(60, value, np.uint16), lengths=np.full(20, 3)) for value in (1, 2)]
    packed = PackedDocuments(corpora, length=4, budget=400, seed=0, weights=[3, 1])
    drawn = np.concatenate([packed.batch(step).inputs.numpy().ravel() for step in range(1, 26)])
    assert len(drawn) == 25 * 40 * 2
    assert (drawn == 1).mean() == 0.75
    again = PackedDocuments(corpora, length=4, budget=400, seed=0, weights=[3, 1])
    assert np.array_equal(again.batch(20).inputs, packed.batch(20).inputs)
    both = PackedDocuments(corpora, length=4, budget=80, seed=0).batch(1).inputs
    assert sorted(both.ravel().tolist()) == [1] * 40 + [2] * 40
    with pytest.raises(ValueError, match="1 numbers for 2 paths"):
        PackedDocuments(corpora, 4, 400, 0, [1])


def test_weights_that_do_not_fit_the_sources_are_refused():
    with pytest.raises(ValueError, match="2 numbers for 1 paths"):
        Windows(Corpus(np.zeros(100, np.uint16)), 8, seed=0, weights=[1, 2])
