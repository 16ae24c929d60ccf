"""WKV-4 beyond what all recurrences share (test_recurrences.py): it is true that …"""

import numpy as np
import pytest
import torch
from support import contract

from rookery.ops.wkv4 import NOTHING_YET, OP, empty_state, wkv4
from rookery.ops.wkv4.cases import Case


def arguments(dtype=torch.float32, **settings):
    return contract.differentiable(contract.arguments_of("wkv4", Case(**settings), dtype))


def runnable(call):
    return [backend for backend in OP.backends.values() if backend.why_not(**call) is None]


def true_sums(state):
    """The two sums themselves."""
    return state[:, :2] * state[:, 2:].exp()


def in_fixed_units(backend):
    """The backend, with its last sums as multiples of e^10."""

    def run(**call):
        y, state = backend.run(**call)
        return y, state[:, :2] * (state[:, 2:].detach() - 10).exp()

    return run


def test_the_definition_is_the_published_quotient_of_sums():
    call = arguments(torch.float64, batch=1, time=12, channels=5, fresh=True)
    log_w, u, k, v = (call[name].numpy() for name in ("log_w", "u", "k", "v"))
    y, state = wkv4(**call, backend="reference")
    for t in range(12):
        weights = [np.exp((t - 1 - i) * log_w + k[0, i]) for i in range(t)] + [np.exp(u + k[0, t])]
        want = sum(w * v[0, i] for i, w in enumerate(weights)) / sum(weights)
        np.testing.assert_allclose(y[0, t].numpy(), want, rtol=1e-12, atol=1e-13)
    weights = np.exp(np.arange(11, -1, -1)[:, None] * log_w + k[0])
    np.testing.assert_allclose(true_sums(state)[0].numpy(), [(weights * v[0]).sum(0), weights.sum(0)], rtol=1e-12)


def test_it_does_not_matter_in_which_unit_the_sums_are_given():
    call = arguments(time=40)
    other = call | {"state": call["state"].clone()}
    other["state"][:, :2] *= torch.tensor(8.0)
    other["state"][:, 2] -= torch.tensor(8.0).log()
    for backend in runnable(call):
        run = in_fixed_units(backend)
        first, second = contract.results(run, call), contract.results(run, other)
        for got, unit in ((first, 1), (second, 8)):
            got["gradient of state"] *= unit
            assert not got["gradient of state"][:, 2].any()
        contract.assert_within(second, first, 1e-4, 1e-5)


def test_the_definition_has_the_gradients_of_finite_differences():
    call = arguments(torch.float64, batch=1, time=5, channels=3)
    top = call["state"][:, 2:]

    def run(log_w, u, k, v, sums):
        y, state = wkv4(log_w=log_w, u=u, k=k, v=v, state=torch.cat([sums, top], dim=1), backend="reference")
        return y, true_sums(state)

    leaves = [call[name] for name in ("log_w", "u", "k", "v")] + [call["state"][:, :2].clone()]
    assert torch.autograd.gradcheck(run, [x.requires_grad_() for x in leaves])


def test_a_state_before_any_token_weighs_nothing():
    call = arguments(time=3, fresh=True)
    assert (call["state"][:, 2] == NOTHING_YET).all()
    for backend in runnable(call):
        y, state = backend.run(**call)
        torch.testing.assert_close(y[:, 0], call["v"][:, 0], rtol=1e-6, atol=0)
        assert state.isfinite().all()
        assert not contract.results(backend.run, call)["gradient of state"].any()


@pytest.mark.parametrize("scale", [100.0, 1e4, 1e30])
@pytest.mark.parametrize("log_w", [0.0, -1e4, -3e38, -float("inf")])
def test_exponents_of_any_size_overflow_nowhere(scale, log_w):
    call = arguments(batch=1, time=70, channels=20, fresh=True)
    call |= {"k": scale * call["k"], "u": scale * call["u"], "log_w": torch.full((20,), log_w)}
    for backend in runnable(call):
        results = contract.results(backend.run, call)
        assert all(x.isfinite().all() for x in results.values()), backend.name
        # an average lies between its values
        seen = call["v"].cummax(1).values, call["v"].cummin(1).values
        assert (results["result 0"] <= seen[0] + 1e-5).all()
        assert (results["result 0"] >= seen[1] - 1e-5).all()


def test_what_is_not_a_number_stays_so_and_goes_no_further():
    call = arguments(time=40, channels=20)
    call["k"][1, 20, 3] = float("nan")
    for backend in runnable(call):
        y, state = backend.run(**call)
        assert y[0].isfinite().all()
        assert y[1, 20:, 3].isnan().all()
        assert y[1, :, 4:].isfinite().all()
        assert state[1, :2, 3].isnan().all()


def test_a_state_for_tensors_of_bfloat16_is_float32():
    assert empty_state(2, 3, like=torch.zeros(1, dtype=torch.bfloat16)).dtype == torch.float32
    assert empty_state(2, 3, like=torch.zeros(1, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.slow
@pytest.mark.parametrize("decay", [(-12.0, -7.0), (-5.0, 3.0)], ids=["slow", "published"])
def test_65536_tokens_in_float32_are_those_in_float64(decay):
    call = arguments(batch=1, time=65536, channels=16, decay=decay, spread=3.0)
    wide = {name: x.double() for name, x in call.items()}
    want = contract.results(in_fixed_units(OP.backends["reference"]), wide)
    for backend in runnable(call):
        # sums of 65536 numbers, one after the other; the definition rounds `top` at every token too (cases.BUDGET)
        bound = 0.05 if backend.name == "reference" else 1e-4
        got = contract.results(in_fixed_units(backend), call)
        for name, x in want.items():
            error = float((got[name].double() - x).norm() / x.norm())
            assert error < bound, f"{backend.name}: {name} {error}"
