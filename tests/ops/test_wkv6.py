"""WKV-6 and WKV-5 beyond what all recurrences share (test_recurrences.py): it is true that …"""

import pytest
import torch
from support import contract

from rookery.ops.wkv5 import OP as OP5
from rookery.ops.wkv5 import wkv5
from rookery.ops.wkv6 import OP, wkv6
from rookery.ops.wkv6.cases import Case


def arguments(dtype=torch.float32, **settings):
    return contract.arguments_of("wkv6", Case(**settings), dtype)


def runnable(op, call):
    return [backend for backend in op.backends.values() if backend.why_not(**call) is None]


def grads_of(call, run):
    leaves = {name: x.clone().requires_grad_() for name, x in contract.differentiable(call).items()}
    y, state = run(**leaves)
    (y.double().square().sum() + state.double().square().sum()).backward()
    return {"y": y.detach(), "state": state.detach()} | {f"d{name}": x.grad for name, x in leaves.items()}


def test_the_definition_is_the_published_double_sum():
    call = {name: x for name, x in arguments(torch.float64, batch=1, time=9, heads=1).items() if x is not None}
    r, log_w, k, v = (call[name][0, :, 0] for name in ("r", "log_w", "k", "v"))
    u, start = call["u"][0], call["state"][0, 0]
    y, state = wkv6(**call, backend="reference")
    for t in range(9):
        want = (start * log_w[:t].sum(0).exp()) @ r[t]
        for i in range(t):
            want = want + (r[t] * log_w[i + 1 : t].sum(0).exp() * k[i]).sum() * v[i]
        want = want + (r[t] * u * k[t]).sum() * v[t]
        torch.testing.assert_close(y[0, t, 0], want, rtol=1e-12, atol=1e-12)
    want = start * log_w.sum(0).exp()
    for i in range(9):
        want = want + v[i][:, None] * (log_w[i + 1 :].sum(0).exp() * k[i])
    torch.testing.assert_close(state[0, 0], want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("lowest", [-50.0, -1e4, -3e38, -float("inf")])
def test_a_decay_of_nothing_leaves_everything_finite(lowest):
    call = arguments(time=70)
    generator = torch.Generator().manual_seed(3)
    fast = torch.rand(call["log_w"].shape, generator=generator) < 0.3
    call["log_w"] = torch.where(fast, lowest, call["log_w"])
    wide = {name: x.double() for name, x in contract.differentiable(call).items()}
    want = grads_of(wide, OP.backends["reference"].run)
    assert all(x.isfinite().all() for x in want.values())
    for backend in runnable(OP, call):
        contract.assert_within(grads_of(call, backend.run), want, 1e-5, 3e-6)


def test_all_tokens_may_forget_everything():
    call = arguments(time=33) | {"log_w": torch.full((2, 33, 3, 32), -float("inf"))}
    for backend in runnable(OP, call):
        y, state = backend.run(**call)
        own = (call["r"] * call["u"] * call["k"]).sum(-1, keepdim=True) * call["v"]
        before = (call["r"][:, 1:] * call["k"][:, :-1]).sum(-1, keepdim=True) * call["v"][:, :-1]
        torch.testing.assert_close(y[:, 1:], own[:, 1:] + before, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(state, call["v"][:, -1][..., None] * call["k"][:, -1][..., None, :])


def test_a_slow_decay_behind_a_fast_one_keeps_its_digits():
    # a difference of cumulative sums around −3000 has two digits of −0.001 left
    call = arguments(time=48)
    call["log_w"] = torch.full_like(call["log_w"], -1e-3)
    call["log_w"][:, ::16] = -3000.0
    wide = {name: x.double() for name, x in contract.differentiable(call).items()}
    want = grads_of(wide, OP.backends["reference"].run)
    for backend in runnable(OP, call):
        contract.assert_within(grads_of(call, backend.run), want, 1e-5, 1e-6)


def test_what_is_not_a_number_stays_so_and_goes_no_further():
    call = arguments(time=40)
    call["log_w"][1, 20] = float("nan")
    for backend in runnable(OP, call):
        y, state = backend.run(**call)
        assert y[0].isfinite().all()
        assert state[0].isfinite().all()
        assert y[1, 21:].isnan().all()
        assert state[1].isnan().all()


def test_first_and_last_decay_have_gradients_where_the_state_is_carried():
    call = arguments(time=12)
    for backend in runnable(OP, call):
        grads = grads_of(call, backend.run)
        assert grads["dlog_w"][:, 0].abs().max() > 1e-3
        assert grads["dlog_w"][:, -1].abs().max() > 1e-3
        fresh = grads_of(call | {"state": torch.zeros_like(call["state"])}, backend.run)
        assert not fresh["dlog_w"][:, 0].any(), f"{backend.name}: there was nothing to forget"


@pytest.mark.parametrize("lengths", [None, (0, 20, 13)], ids=str)
def test_one_decay_for_all_tokens_is_the_same_decay_at_every_token(lengths):
    call = contract.arguments_of("wkv5", Case(batch=1 if lengths else 2, time=33, lengths=lengths), torch.float32)
    for backend in runnable(OP5, call):
        got = grads_of(call, lambda **c: wkv5(**c, cu_seqlens=call["cu_seqlens"], backend=backend.name))  # noqa: B023
        every = call | {"log_w": call["log_w"].expand_as(call["r"])}
        want = grads_of(every, lambda **c: wkv6(**c, cu_seqlens=call["cu_seqlens"], backend=backend.name))  # noqa: B023
        want["dlog_w"] = want["dlog_w"].sum((0, 1))
        contract.assert_within(got, want, 1e-5, 3e-6)


def test_the_definition_has_the_gradients_of_finite_differences():
    call = contract.differentiable(arguments(torch.float64, batch=1, time=4, heads=1, key=3, value=2))
    leaves = [x.requires_grad_() for x in call.values()]
    for backend in ("reference", "chunked"):
        run = lambda *given, backend=backend: wkv6(**dict(zip(call, given)), backend=backend)  # noqa: E731
        assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.slow
@pytest.mark.parametrize("decay", [(-12.0, -7.0), (-6.0, -1.0), (-7.0, 3.0)], ids=["slow", "trained", "fast"])
def test_65536_tokens_in_float32_are_those_in_float64(decay):
    call = arguments(batch=1, time=65536, heads=1, key=64, value=64, decay=decay)
    wide = {name: x.double() for name, x in contract.differentiable(call).items()}
    want = grads_of(wide, OP.backends["chunked"].run)
    for backend in runnable(OP, call):
        if backend.name != "reference":
            got = grads_of(call, backend.run)
            for name, x in want.items():
                error = (got[name].double() - x).norm() / x.norm()
                # du is the sum of 65536 numbers in float32, one after the other
                assert error < (1e-5 if name == "du" else 5e-6), f"{backend.name}: {name} {error}"


@pytest.mark.slow
@pytest.mark.parametrize(("decay", "bound"), [((-12.0, -7.0), 1e-3), ((0.0, 8.0), 1e-5)], ids=["slow", "to nothing"])
def test_65536_tokens_with_one_decay_in_float32_are_those_in_float64(decay, bound):
    case = Case(batch=1, time=65536, heads=1, key=64, value=64, decay=decay)
    call = contract.differentiable(contract.arguments_of("wkv5", case, torch.float32))
    want = grads_of({name: x.double() for name, x in call.items()}, OP5.backends["chunked"].run)
    for backend in runnable(OP5, call):
        if backend.name != "reference":
            got = grads_of(call, backend.run)
            for name, x in want.items():
                error = (got[name].double() - x).norm() / x.norm()
                # the same decay is rounded to float32 in the same direction at every token
                assert error < bound, f"{backend.name}: {name} {error}"
