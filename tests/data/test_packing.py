import numpy as np
import pytest

from rookery.data.jsonl import Sample
from rookery.data.packing import IGNORED, Packs, collate, shortened


def sample(length, first=0, learned=None):
    flags = np.ones(length, bool) if learned is None else np.array(learned)
    return Sample(np.arange(first, first + length), flags)


def test_nothing_predicts_across_a_border():
    batch = collate([sample(3, 10), sample(4, 20, [False, False, True, True])])
    assert batch.inputs.tolist() == [[10, 11, 20, 21, 22]]
    assert batch.targets.tolist() == [[11, 12, IGNORED, 22, 23]]
    assert batch.cu_seqlens.tolist() == [0, 2, 5]


def test_long_samples_are_cut_and_those_that_teach_nothing_left_out():
    kept, changed = shortened([sample(9), sample(5), sample(6, 0, [False] * 5 + [True]), sample(1)], 4)
    assert [len(s.tokens) for s in kept] == [5, 5]
    assert changed == 3


def test_every_sample_comes_once_a_pass_and_no_batch_is_too_full():
    samples = [sample(2 + i % 7) for i in range(40)]
    packs = Packs(samples, budget=16, seed=3)
    seen = []
    for step in range(1, 200):
        seen += packs.indices(step).tolist()
        assert packs.batch(step).inputs.shape[1] <= 16
        if len(seen) >= 80:
            break
    assert sorted(seen[:40]) == sorted(seen[40:80]) == list(range(40))
    assert seen[:40] != seen[40:80]


def test_the_order_is_a_function_of_seed_and_step():
    samples = [sample(2 + i % 7) for i in range(40)]
    one, other = Packs(samples, 16, seed=3), Packs(samples, 16, seed=3)
    late = other.indices(30).tolist()  # asked for without those before
    assert [one.indices(step).tolist() for step in range(1, 31)][-1] == late
    assert Packs(samples, 16, seed=4).indices(1).tolist() != one.indices(1).tolist()


def test_samples_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="every sample must have 1 to 4 tokens"):
        Packs([sample(9)], 4, 0)
