import numpy as np
import pytest

from rookery.data.jsonl import Sample
from rookery.data.packing import IGNORED, Packs, collate, fitted


def sample(length, first=0, learned=None):
    flags = np.ones(length, bool) if learned is None else np.array(learned)
    return Sample(np.arange(first, first + length), flags)


def test_nothing_predicts_across_a_border():
    batch = collate([sample(3, 10), sample(4, 20, [False, False, True, True])])
    assert batch.inputs.tolist() == [[10, 11, 20, 21, 22]]
    assert batch.targets.tolist() == [[11, 12, IGNORED, 22, 23]]
    assert batch.cu_seqlens.tolist() == [0, 2, 5]


def test_long_conversations_are_cut_and_those_that_teach_nothing_left_out():
    answers = lambda length, first: sample(length, 0, [i >= first for i in range(length)])  # noqa: E731
    kept, changed = fitted([answers(9, 2), answers(5, 3), answers(6, 5), sample(1)], 4)
    assert [len(s.tokens) for s in kept] == [5, 5]
    assert changed == 3


def test_long_texts_are_cut_into_pieces_that_lose_nothing():
    kept, changed = fitted([sample(10, 100, [False, *[True] * 9])], 4)
    assert [s.tokens.tolist() for s in kept] == [[100, 101, 102, 103, 104], [104, 105, 106, 107, 108], [108, 109]]
    assert changed == 0
    assert collate(kept).targets[0].tolist() == list(range(101, 110))


LENGTHS = [1 + i % 7 for i in range(40)]


def test_every_document_comes_once_a_pass_and_no_batch_is_too_full():
    packs, seen, step = Packs(LENGTHS, budget=16, seed=3), [], 0
    while len(seen) < 80:
        step += 1
        seen += packs.indices(step).tolist()
        assert sum(LENGTHS[i] for i in packs.indices(step)) <= 16
    assert sorted(seen[:40]) == sorted(seen[40:80]) == list(range(40))
    assert seen[:40] != seen[40:80]


def test_the_order_is_a_function_of_seed_and_step():
    one, other = Packs(LENGTHS, 16, seed=3), Packs(LENGTHS, 16, seed=3)
    late = other.indices(30).tolist()  # asked for without those before
    assert [one.indices(step).tolist() for step in range(1, 31)][-1] == late
    assert Packs(LENGTHS, 16, seed=4).indices(1).tolist() != one.indices(1).tolist()


@pytest.mark.parametrize("lengths", [[9], []])
def test_documents_that_do_not_fit_are_refused(lengths):
    with pytest.raises(ValueError, match="documents need 1 to 4 tokens each"):
        Packs(lengths, 4, 0)
