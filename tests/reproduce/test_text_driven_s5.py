"""S5 told in words: it is true that …"""

import numpy as np
import pytest
import torch

from rookery.data.word_problems import generators
from rookery.reproduce.text_driven_s5 import POINTS, asked, problems


def test_the_words_name_the_things_and_then_swap_them():
    words, places = problems(np.random.default_rng(0), 3, 4)
    assert words.shape == (3, POINTS + 4)
    assert places.shape == (3, 5, POINTS)
    assert words[:, :POINTS].tolist() == [[0, 1, 2, 3, 4]] * 3
    swaps = generators(POINTS)
    for row, found in zip(words, places):
        things = list(range(POINTS))
        for word, after in zip(row[POINTS:], found[1:]):
            things = [int(swaps[word - POINTS][place]) for place in things]
            assert after.tolist() == things


@pytest.mark.parametrize("cross", ["text_kv", "text_read", "text_r", "softmax"])
def test_answers_after_every_word_are_those_of_each_beginning(cross):
    model = asked(cross, 1.0 if cross == "softmax" else 2.0, seed=0)
    words, places = problems(np.random.default_rng(0), 2, 3)
    with torch.no_grad():
        along = model.along(words)
        assert along.shape == (*places.shape, POINTS)
        for swaps in range(4):
            some = words[:, : POINTS + swaps]
            alone = model(some, torch.ones_like(some, dtype=torch.bool))
            torch.testing.assert_close(along[:, swaps], alone, rtol=1e-4, atol=1e-5)
