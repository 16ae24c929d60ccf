"""WKV-7 beyond what all recurrences share (test_recurrences.py): it is true that …"""

import pytest
import torch
from support import contract

from rookery.errors import BackendUnavailable
from rookery.ops.wkv7 import OP, chunked, wkv7
from rookery.ops.wkv7.cases import Case

PACKED = Case(batch=1, time=40, lengths=(0, 7, 33))


def arguments(case=Case(), dtype=torch.float32):  # noqa: B008 - a case is frozen
    return contract.arguments_of("wkv7", case, dtype)


def runnable(call):
    return [name for name, backend in OP.backends.items() if backend.why_not(**call) is None]


def test_decay_to_nothing_forgets_and_what_is_not_a_number_stays_so():
    call = arguments(Case(time=3))
    call["log_w"][:, 1] = -float("inf")
    call["log_w"][1, 2] = float("nan")
    for backend in ("native", "reference"):
        if backend in runnable(call):
            y, state = wkv7(**call, backend=backend)
            assert y[0].isfinite().all()
            assert y[1, 2].isnan().all()
            assert state[1].isnan().all()


@pytest.mark.parametrize("chunk", [1, 2, 16, 300])
@pytest.mark.parametrize("case", [Case(time=50, heads=2), PACKED], ids=["rows", "packed"])
def test_the_chunked_backend_does_not_depend_on_the_size_of_its_chunks(chunk, case):
    call = arguments(case, torch.float64)
    got = contract.results(chunked.wkv7, call, chunk=chunk)
    contract.assert_within(got, contract.expected("wkv7", case, torch.float64), 1e-9, 1e-12)


def test_a_decay_too_strong_for_chunks_is_refused_by_name_and_goes_to_the_definition():
    call = arguments(dtype=torch.float64)
    call["log_w"][0, 0, 0, 0] = -30.0
    assert OP.pick(None, **call).name == "reference"
    with pytest.raises(BackendUnavailable, match=r"goes down to -30, and chunks of 64 tokens need -2.5 or more"):
        wkv7(**call, backend="chunked")


@pytest.mark.slow
@pytest.mark.parametrize("decay", [(-0.6065, -0.5), (-0.6065, 0.0), (-1e-4, 0.0)], ids=["fast", "trained", "slow"])
def test_65536_tokens_in_float32_are_those_in_float64(decay):
    case = Case(batch=1, time=65536, heads=1, key=64, value=64, decay=decay)
    call = arguments(case)
    wide = {name: x.double() for name, x in contract.differentiable(call).items()}
    want = contract.results(OP.backends["chunked"].run, wide)
    for backend in runnable(call):
        if backend != "reference":
            got = contract.results(OP.backends[backend].run, call)
            for name, x in want.items():
                error = (got[name].double() - x).norm() / x.norm()
                assert error < 2e-5, f"{backend}: {name} {error}"


def steps(*parts, width=3):
    """One head's call for tokens (r, k, v, a, b), each a vector or None for zeros, without decay, in float64."""
    names = ("r", "k", "v", "a", "b")
    zero = torch.zeros(width, dtype=torch.float64)
    call = {name: torch.stack([zero if part[i] is None else part[i] for part in parts]) for i, name in enumerate(names)}
    return {name: x[None, :, None] for name, x in call.items()} | {
        "log_w": torch.zeros(1, len(parts), 1, width).double()
    }


def unit(*numbers):
    return torch.nn.functional.normalize(torch.tensor(numbers, dtype=torch.float64), dim=0)


def test_what_was_written_at_a_key_is_read_there_and_overwritten():
    key, other = unit(1, 2, -2), unit(2, 1, 2)  # orthogonal
    one, two, three = (torch.randn(3, dtype=torch.float64) for _ in range(3))
    y, _ = wkv7(**steps((key, key, one, -key, key), (None, other, two, -other, other), (key, key, three, -key, key),
                        (other, None, None, None, None)))  # fmt: skip
    torch.testing.assert_close(y[0, 0, 0], one)
    torch.testing.assert_close(y[0, 2, 0], three)
    torch.testing.assert_close(y[0, 3, 0], two)


def test_removing_twice_as_much_is_a_reflection_whose_square_is_nothing():
    key = unit(1, 2, 3)
    start = torch.randn(1, 1, 3, 3, dtype=torch.float64)
    mirror = (None, None, None, -key, 2 * key)
    _, once = wkv7(**steps(mirror), state=start)
    _, twice = wkv7(**steps(mirror, mirror), state=start)
    torch.testing.assert_close(once[0, 0], start[0, 0] @ (torch.eye(3).double() - 2 * torch.outer(key, key)))
    torch.testing.assert_close(twice, start)


def test_without_removal_the_state_only_decays():
    generator = torch.Generator().manual_seed(3)
    call = steps(*[[torch.randn(3, generator=generator).double() for _ in range(3)] + [None, None] for _ in range(4)])
    call["log_w"] = -torch.rand(1, 4, 1, 3, generator=generator).double()
    y, _ = wkv7(**call)
    state = torch.zeros(3, 3, dtype=torch.float64)
    for t in range(4):
        state = state * call["log_w"][0, t, 0].exp() + torch.outer(call["v"][0, t, 0], call["k"][0, t, 0])
        torch.testing.assert_close(y[0, t, 0], state @ call["r"][0, t, 0])  # reads after the update
