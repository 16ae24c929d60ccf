"""Decorrelated backpropagation for start states (state_methods.md 1.5, oracle 1.9.6): it is true that …"""

import pytest
import torch
from support.language import randomised, some_tokens

from rookery.adapt.decorrelate import Decorrelation, begin, correlation, covariance, decorrelate, improved, whitening
from rookery.adapt.kernel_state import KernelStart
from rookery.adapt.read_features import read_features
from rookery.adapt.state_tuning import StartState
from rookery.models import create_model

START = {"plain": StartState, "kernel": lambda model: KernelStart(model, features=24)}


def start_of(kind, name="rwkv7-test"):
    start = START[kind](randomised(name).requires_grad_(False).eval())
    if kind == "kernel":
        start.calibrate(some_tokens(start.model[0], 2, 40))
    return start


def scattered(start):
    with torch.no_grad():
        for layer, wkv in enumerate(start.wkv):
            wkv.copy_(torch.randn(wkv.shape, generator=torch.Generator().manual_seed(layer)))


def logits_of(start):
    return start.model[0](some_tokens(start.model[0], 2, 12), start(2))[0]


def ill_conditioned(condition, positions=4000, size=16):
    """Inputs whose covariance has this condition number, one head."""
    generator = torch.Generator().manual_seed(0)
    turn, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    x = torch.randn(positions, size, generator=generator, dtype=torch.float64)
    x = x @ torch.linalg.inv(torch.linalg.cholesky(x.T @ x / positions)).T  # exactly white
    return ((x * torch.logspace(0, -0.5, size, condition**1.0, dtype=torch.float64)) @ turn)[:, None]


@torch.no_grad()
@pytest.mark.parametrize("kind", START)
def test_folding_and_the_exact_factor_leave_the_model_as_it_is(kind):
    start = start_of(kind)
    before = logits_of(start)
    features = read_features(start, some_tokens(start.model[0], 4, 40))
    decorrelate(start, features)
    assert torch.equal(logits_of(start), before), "a state of zeros stays one"
    scattered(start)
    tuned = logits_of(start)
    assert not torch.allclose(tuned, before)
    start.fold()
    assert start.factors is None
    torch.testing.assert_close(logits_of(start), tuned, rtol=1e-12, atol=1e-12)
    decorrelate(start, features)
    torch.testing.assert_close(logits_of(start), tuned, rtol=1e-9, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("name", ["rwkv5-test", "rwkv6-test", "rwkv7-test"])
def test_the_trained_map_gets_white_inputs(name):
    start = start_of("plain", name)
    features = read_features(start, some_tokens(start.model[0], 8, 60))
    decorrelate(start, features, ridge=1e-9)
    for r, x in zip(start.factors, features):
        z = covariance(torch.einsum("hij,phj->phi", r, x))
        values = torch.linalg.eigvalsh(z)
        assert (values - 1).abs().lt(1e-3).float().mean() > 0.5, "directions that are read at all are of size 1"
        assert values.max() < 1.001


def test_one_step_of_size_one_reaches_least_squares():
    x = ill_conditioned(5e3)
    values = torch.linalg.eigvalsh(covariance(x)[0])
    assert 4e3 < values[-1] / values[0] < 6e3
    y = x[:, 0] @ torch.randn(16, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y = y + 0.1 * torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    best = torch.linalg.lstsq(x[:, 0], y).solution.T
    for ridge, wanted in ((1e-6, 1e-3), (1e-4, 1e-1)):
        r = whitening(x, ridge)[0]
        z = torch.zeros(5, 16, dtype=torch.float64, requires_grad=True)
        loss = (x[:, 0] @ (z @ r).T - y).square().sum(-1).mean() / 2
        (gradient,) = torch.autograd.grad(loss, z)
        state = -gradient @ r
        assert (state - best).norm() / best.norm() < wanted


@pytest.mark.parametrize(("eta", "kappa"), [(0.1, 0.0), (0.1, 0.5), (0.5, 0.0), (0.5, 0.5)])
def test_every_step_of_the_rule_lowers_the_correlation(eta, kappa):
    x = ill_conditioned(4.7e3)
    r, found = begin(x), []
    for _ in range(100):
        found.append(float(correlation(torch.einsum("hij,phj->phi", r, x))))
        r = improved(r, x, eta, kappa)
    assert all(later <= before + 1e-15 for before, later in zip(found, found[1:]))
    assert found[-1] < 0.5 * found[0]
    if (eta, kappa) == (0.5, 0.5):
        assert found[-1] < 1e-4
        sizes = covariance(torch.einsum("hij,phj->phi", r, x))[0].diagonal()
        torch.testing.assert_close(sizes, torch.ones_like(sizes), rtol=0.02, atol=0.0)


@torch.no_grad()
def test_moving_factors_leave_a_state_of_zeros_and_with_compensation_any_state():
    for compensate in (False, True):
        start = start_of("kernel")
        features = read_features(start, some_tokens(start.model[0], 4, 40))
        before = logits_of(start)
        rule = Decorrelation(start, features, compensate=compensate)
        rule.step(features)
        assert torch.equal(logits_of(start), before)
        scattered(start)
        tuned = logits_of(start)
        rule.step(features)
        change = (logits_of(start) - tuned).abs().max()
        assert change < 1e-9 if compensate else change > 1e-6


def test_rwkv4_is_refused():
    start = StartState(create_model("rwkv4-test"))
    with pytest.raises(ValueError, match="RWKV-4's state has no matrix whose inputs could be decorrelated"):
        decorrelate(start, [])
