"""The order of samples: it is true that …"""

from itertools import pairwise

import numpy as np
import pytest

from rookery.data.order import Mixture, Official, magic_prime


@pytest.mark.parametrize(
    ("tokens", "length", "prime"), [(1_498_226_207, 512, 2_926_181), (332_115_325_534, 4096, 81_082_817)]
)
def test_the_magic_primes_are_the_published_ones(tokens, length, prime):
    assert magic_prime(tokens, length) == prime


def test_the_official_order_visits_every_window_of_a_pass_once():
    order = Official(tokens=16 * 120, length=16)
    starts = [order.start(sample) for sample in range(order.prime)]
    assert sorted(starts) == [16 * window for window in range(order.prime)]
    assert order.start(order.prime) == starts[0]


def test_the_official_order_is_that_of_the_formula():
    order = Official(tokens=1_498_226_207, length=512)
    prime = 2_926_181
    factor = int(prime * (5**0.5 - 1) / 2)
    assert [order.start(s - 1) for s in (1, 2, 40320)] == [factor * s**3 % prime * 512 for s in (1, 2, 40320)]


def test_too_little_text_for_the_official_order_says_how_much_it_needs():
    with pytest.raises(ValueError, match="at least 48"):
        magic_prime(40, 16)


def test_every_thousand_samples_of_a_mixture_hold_the_exact_shares_and_each_source_is_counted():
    mixture = Mixture([0.5, 0.3, 0.2], seed=3)
    drawn = [mixture.source(sample) for sample in range(2000)]
    for block in (drawn[:1000], drawn[1000:]):
        assert np.bincount([source for source, _ in block]).tolist() == [500, 300, 200]
    for source in range(3):
        assert [number for s, number in drawn if s == source] == list(range(2 * (500, 300, 200)[source]))
    assert any(a[0] != b[0] for a, b in pairwise(drawn[:10]))


def test_a_mixture_is_a_function_of_the_sample():
    one, other = Mixture([1, 2], seed=1), Mixture([1, 2], seed=1)
    assert one.source(5000) == [other.source(sample) for sample in range(5001)][-1]


def test_weights_must_be_above_zero():
    with pytest.raises(ValueError, match="above 0"):
        Mixture([1.0, 0.0], seed=0)
