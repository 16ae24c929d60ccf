"""Noise levels and what predictions say: it is true that …"""

import math

import pytest
import torch

from rookery.families.diffusion import DiffusionConfig
from rookery.nn.noise import Noise, posterior, variational_bound

KINDS = ["eps", "v", "flow"]


def noise_of(prediction="eps", **overrides):
    return Noise.of(DiffusionConfig(prediction=prediction, **overrides))


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_levels_grow_from_nearly_the_image_to_nearly_noise(kind):
    noise = noise_of(kind)
    assert len(noise) == 1000
    assert (noise.alpha.diff() < 0).all()
    assert (noise.sigma.diff() > 0).all()
    assert noise.alpha[0] > 0.99
    assert noise.alpha_bar[-1] < 1e-4
    if kind != "flow":
        torch.testing.assert_close(noise.alpha**2 + noise.sigma**2, torch.ones(1000, dtype=torch.float64))


def test_noisy_images_have_the_moments_of_the_equation():
    noise, image = noise_of(), torch.full((200_000, 1, 1, 1), 0.7, dtype=torch.float64)
    for level in (0, 300, 999):
        found = noise.add(image, drawn(*image.shape), torch.full((len(image),), level))
        assert float(found.mean()) == pytest.approx(0.7 * float(noise.alpha[level]), abs=0.01)
        assert float(found.std()) == pytest.approx(float(noise.sigma[level]), abs=0.01)


@pytest.mark.parametrize("kind", KINDS)
def test_a_perfect_prediction_gives_image_and_noise_back(kind):
    noise = noise_of(kind, noise_steps=50)
    images, eps, level = drawn(4, 1, 5, 3), drawn(4, 1, 5, 3, seed=1), torch.tensor([0, 7, 30, 48])
    noisy = noise.add(images, eps, level)
    found = noise.parts(noisy, noise.target(images, eps, level), level)
    torch.testing.assert_close(found.image, images, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.noise, eps, rtol=1e-9, atol=1e-9)
    clipped = noise.parts(noisy, noise.target(images, eps, level), level, clip=0.5)
    assert clipped.image.abs().max() == 0.5
    torch.testing.assert_close(noise.add(clipped.image, clipped.noise, level), noisy)


def test_the_posterior_is_that_of_two_normal_distributions():
    noise = noise_of(noise_steps=20)
    bars = noise.alpha_bar.tolist()
    step = posterior(bars[9], bars[8])
    # x_8 = √ᾱ_8 x + …, x_9 = √(1 − β) x_8 + √β ε: precision adds
    beta = 1 - bars[9] / bars[8]
    assert step.beta == pytest.approx(beta)
    assert step.posterior == pytest.approx(1 / ((1 - beta) / beta + 1 / (1 - bars[8])))
    assert step.noisy == pytest.approx(step.posterior * math.sqrt(1 - beta) / beta)
    assert step.image == pytest.approx(step.posterior * math.sqrt(bars[8]) / (1 - bars[8]))
    last = posterior(bars[0], 1.0)
    assert (last.image, last.noisy, last.posterior) == (pytest.approx(1), 0, 0)


def test_the_bound_is_least_where_the_prediction_is_right():
    noise = noise_of(noise_steps=50, beta_last=0.2)
    images = (drawn(64, 1, 4, 4).clamp(-1, 1) * 127.5).round() / 127.5
    eps, level = drawn(64, 1, 4, 4, seed=1), torch.arange(64) % 50
    noisy = noise.add(images, eps, level)

    def bound(error, share):
        output = torch.cat([eps + error, torch.full_like(eps, share)], dim=1)
        return variational_bound(noise, images, noisy, output, level)

    right = bound(0.0, -1.0)  # the variance where the image is known, and the image known
    assert right[level > 0].abs().max() < 1e-9
    assert (bound(0.0, 0.5)[level > 0] > 0).all()
    assert (bound(0.3, -1.0)[level > 0] > right[level > 0]).all()
    assert bound(0.3, -1.0).isfinite().all()
    assert (right[level == 0] > 0).all()
    assert (bound(1.0, -1.0)[level == 0] > right[level == 0]).all()


def test_the_bound_teaches_the_variance_and_not_the_mean():
    noise = noise_of(noise_steps=50)
    images, eps, level = drawn(3, 1, 2, 2), drawn(3, 1, 2, 2, seed=1), torch.tensor([0, 9, 30])
    output = drawn(3, 2, 2, 2, seed=2).requires_grad_()
    variational_bound(noise, images, noise.add(images, eps, level), output, level).sum().backward()
    assert not output.grad[:, :1].any()
    assert output.grad[1:, 1:].all()
