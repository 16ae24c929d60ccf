"""Ways back from noise, and guidance: it is true that …"""

import math
import re

import pytest
import torch
from support.diffusion import images, randomised

from rookery.errors import UnknownName
from rookery.families.diffusion import DiffusionConfig
from rookery.imaging.sample import Guidance, guided, sample
from rookery.imaging.samplers import DDIM, DDPM, DPM, SAMPLERS, Euler, sampler
from rookery.nn.noise import Noise, Parts

KINDS = ["eps", "v", "flow"]


def noise_of(prediction="eps", **overrides):
    return Noise.of(DiffusionConfig(prediction=prediction, **{"noise_steps": 100, "beta_last": 0.1, **overrides}))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def run(rule, noise, start, truth, steps, generator=None):
    """The way back with a model that knows the image at the end."""
    rule.set_timesteps(steps)
    x = start
    for level in rule.timesteps:
        levels = torch.full((len(x),), level)
        alpha, sigma = noise.at(levels, x)
        eps = (x - alpha * truth) / sigma
        x = rule.step(noise.target(truth, eps, levels), level, x, generator=generator)
    return x


def test_respacing_keeps_the_levels_that_it_keeps():
    noise, rule = noise_of(noise_steps=1000, beta_last=0.02), DDIM(noise_of(noise_steps=1000, beta_last=0.02))
    rule.set_timesteps(50)
    assert (len(rule.timesteps), rule.timesteps[0], rule.timesteps[-1]) == (50, 999, 0)
    assert all(a > b for a, b in zip(rule.timesteps, rule.timesteps[1:]))
    level = rule.timesteps[7]
    assert rule.coefficients(level)[0] ** 2 == pytest.approx(float(noise.alpha_bar[level]))
    for steps in (0, 1001):
        with pytest.raises(ValueError, match=f"steps go from 1 to 1000, the model's noise levels; got {steps}"):
            rule.set_timesteps(steps)
    with pytest.raises(ValueError, match="level 998 is none of the timesteps"):
        rule.step(torch.zeros(1, 1, 2, 2), 998, torch.zeros(1, 1, 2, 2))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 5, 100])
def test_with_the_true_noise_every_way_ends_at_the_image(name, kind, steps):
    noise = noise_of(kind)
    if (name, kind) == ("ddpm", "flow") or (name == "euler" and kind != "flow"):
        with pytest.raises(ValueError, match=r"use ddim, euler or dpm\+\+|euler is for models that predict a flow"):
            sampler(name, noise)
        return
    truth = images(4, 4, batch=3).clamp(-1, 1)
    found = run(sampler(name, noise), noise, images(4, 4, batch=3, seed=9), truth, steps, seeded())
    torch.testing.assert_close(found, truth, rtol=1e-7, atol=1e-7)


def test_ddim_without_new_noise_inverts_exactly():
    noise = noise_of()
    truth, eps = images(4, 4).clamp(-1, 1), images(4, 4, seed=7)
    rule = DDIM(noise, clip=None)
    rule.set_timesteps(20)
    x = noise.add(truth, eps, torch.full((2,), 99))
    for level, after in zip(rule.timesteps, rule.timesteps[1:]):
        x = rule.step(eps, level, x)
        torch.testing.assert_close(x, noise.add(truth, eps, torch.full((2,), after)), rtol=1e-9, atol=1e-9)


def test_ddpm_and_ddim_with_eta_1_draw_with_the_same_spread():
    noise = noise_of()
    start = torch.zeros(40_000, 1, 1, 1, dtype=torch.float64)
    means, spreads = [], []
    for rule in (DDPM(noise), DDIM(noise, eta=1.0)):
        rule.set_timesteps(10)
        found = rule.step(torch.full_like(start, 0.3), rule.timesteps[4], start, generator=seeded())
        means.append(float(found.mean()))
        spreads.append(float(found.std()))
    assert means[0] == pytest.approx(means[1], abs=0.01)
    assert spreads[0] == pytest.approx(spreads[1], rel=0.02)


def test_a_learned_variance_lies_between_its_bounds():
    noise, rule = noise_of(), DDPM(noise_of())
    rule.set_timesteps(10)
    start = torch.zeros(40_000, 1, 1, 1, dtype=torch.float64)
    spread = []
    for share in (-1.0, 0.0, 1.0):
        output = torch.cat([torch.zeros_like(start), torch.full_like(start, share)], dim=1)
        spread.append(float(rule.step(output, rule.timesteps[5], start, generator=seeded()).std()))
    fixed = float(rule.step(torch.zeros_like(start), rule.timesteps[5], start, generator=seeded()).std())
    assert spread[0] == pytest.approx(fixed)
    assert spread[0] < spread[1] < spread[2]
    assert spread[1] == pytest.approx(math.sqrt(spread[0] * spread[2]))
    level, after = rule.timesteps[5:7]
    assert spread[2] ** 2 == pytest.approx(1 - float(noise.alpha_bar[level] / noise.alpha_bar[after]), rel=0.03)


def test_two_steps_in_memory_follow_a_curve_better_than_one():
    """For data that is N(m, s²) the way is known: x − α m stays the same number of √(α² s² + σ²)."""
    noise, mean, spread = noise_of(noise_steps=1000, beta_last=0.02), 0.5, 0.2

    def errors(rule):
        rule.set_timesteps(20)
        x, found, place = torch.ones(1, 1, 1, 1, dtype=torch.float64), [], None
        for level in rule.timesteps:
            alpha, sigma = rule.coefficients(level)
            wide = math.hypot(alpha * spread, sigma)
            place = (1 - alpha * mean) / wide if place is None else place
            found.append(abs(float(x) - alpha * mean - wide * place))
            image = mean + spread**2 * alpha / wide**2 * (x - alpha * mean)
            x = rule.step((x - alpha * image) / sigma, level, x)
        return found

    line, curve = errors(DDIM(noise, clip=None)), errors(DPM(noise, clip=None))
    assert all(b < a / 2 for a, b in zip(line[4:-1], curve[4:-1]))
    assert curve[-1] < line[-1]


def test_euler_is_a_straight_line():
    noise = noise_of("flow")
    rule = Euler(noise)
    rule.set_timesteps(4)
    x, speed = images(3, 3), images(3, 3, seed=8) * 0.01
    level, after = rule.timesteps[1:3]
    moved = DDIM.move(rule, Parts(*noise.parts(x, speed, torch.full((2,), level))), x, level, after, None)
    torch.testing.assert_close(moved, x + (noise.sigma[after] - noise.sigma[level]) * speed)


def test_unknown_samplers_and_noise_that_does_not_fit_are_refused():
    with pytest.raises(UnknownName, match="no sampler named 'dpm'. Did you mean"):
        sampler("dpm", noise_of())
    with pytest.raises(ValueError, match="leave eta at 0"):
        DDIM(noise_of("flow"), eta=0.5)


# guidance


def test_guidance_goes_from_the_null_prediction_through_the_conditional():
    told, null = images(4, 4, channels=6), images(4, 4, channels=6, seed=9)
    assert torch.equal(guided(told, null, Guidance(scale=0.0), 3)[:, :3], null[:, :3])
    torch.testing.assert_close(guided(told, null, Guidance(scale=1.0), 3), told)
    found = guided(told, null, Guidance(scale=4.0), 3)
    torch.testing.assert_close(found[:, :3], null[:, :3] + 4 * (told - null)[:, :3])
    assert torch.equal(found[:, 3:], told[:, 3:])  # the learned variance is never guided
    few = guided(told, null, Guidance(scale=4.0, channels=2), 3)
    assert torch.equal(few[:, :2], found[:, :2])
    assert torch.equal(few[:, 2:], told[:, 2:])
    calm = guided(told, null, Guidance(scale=4.0, rescale=1.0), 3)
    torch.testing.assert_close(calm[:, :3].std((1, 2, 3)), told[:, :3].std((1, 2, 3)))


def test_guidance_of_1_never_asks_the_null_model_and_an_interval_does_not_outside():
    assert not Guidance().active(0.5)
    inside = Guidance(scale=3.0, start=0.25, stop=0.75)
    assert [inside.active(done) for done in (0.0, 0.25, 0.5, 0.75)] == [False, True, True, False]


@pytest.mark.parametrize("name", ["diffusion-rwkv-test", "dir-7-softmax-test"])
def test_the_same_seed_gives_the_same_images_for_any_model(name):
    model = randomised(name, dtype=torch.float32)
    rule = DDIM(Noise.of(model.config))
    rule.set_timesteps(4)
    said = torch.tensor([1, 2]) if "rwkv" in name else None
    calls = []

    def draw(seed, **more):
        settings = {"shape": (2, 5, 7), "sampler": rule, "guidance": Guidance(scale=2.0), "generator": seeded(seed)}
        return sample(model, said, **settings, report=lambda *place: calls.append(place), **more)

    first = draw(0)
    assert first.shape == (2, 1, 5, 7)
    assert first.abs().max() <= 1
    assert torch.equal(first, draw(0))
    assert not torch.equal(first, draw(1))
    assert calls[:4] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    if "rwkv" in name:
        assert not torch.equal(first, draw(0, negative=torch.tensor([3, 3])))
        with pytest.raises(ValueError, match=re.escape("labels must be whole numbers [2]")):
            draw(0, negative=torch.tensor([3]))
