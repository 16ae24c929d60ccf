import numpy as np
import pytest

from rookery.data.images import digits
from rookery.evaluate.generated import Neighbours, Principal, fd_score, prompt_accuracy


def test_the_distance_of_two_normal_distributions_is_known():
    generator = np.random.default_rng(0)
    one = generator.normal(0, 1, (200_000, 2))
    two = generator.normal([3, 0], [2, 1], (200_000, 2))
    assert fd_score(one, two) == pytest.approx(9 + 1, rel=0.02)  # squared means, and (2 − 1)² of the deviations
    assert fd_score(one, one) == pytest.approx(0, abs=1e-9)
    assert fd_score(one, two) == pytest.approx(fd_score(two, one))
    with pytest.raises(ValueError, match="features must be"):
        fd_score(one, two[:1])
    with pytest.raises(ValueError, match="features must be"):
        fd_score(one, two[:, :1])


def test_real_digits_are_near_real_digits_and_far_from_noise():
    found = digits()
    pixels = found.sources.astype(np.float64) / 255 * 16
    features = Principal.of(pixels)
    halves = fd_score(features(pixels[::2]), features(pixels[1::2]))
    noise = np.random.default_rng(0).uniform(0, 16, pixels.shape)
    assert halves == pytest.approx(10.86, abs=0.1)
    assert halves < fd_score(features(pixels), features(noise)) / 5


def test_neighbours_name_digits_and_prompts_are_counted():
    found = digits()
    pixels = found.sources.astype(np.float64)
    name = Neighbours.of(pixels[::2], found.labels[::2])
    assert prompt_accuracy(pixels[1::2], found.labels[1::2], name) > 0.97
    assert prompt_accuracy(pixels[1::2], (found.labels[1::2] + 1) % 10, name) < 0.02
    with pytest.raises(ValueError, match="3 pictures and 2 prompts"):
        prompt_accuracy(pixels[:3], found.labels[:2], name)
