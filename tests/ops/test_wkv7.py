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
