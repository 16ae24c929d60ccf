"""WKV-7 beyond the contract of all operators (test_contract.py): it is true that …"""

import pytest
import torch
from support import contract

from rookery.errors import BackendUnavailable
from rookery.ops.dispatch import native_module
from rookery.ops.wkv7 import OP, chunked, wkv7
from rookery.ops.wkv7.cases import Case

needs_native = pytest.mark.skipif(isinstance(native_module(), str), reason=str(native_module()))
PACKED = Case(batch=1, time=40, lengths=(0, 7, 33))


def arguments(case=Case(), dtype=torch.float32):  # noqa: B008 - a case is frozen
    return contract.arguments_of("wkv7", case, dtype)


def runnable(call):
    return [name for name, backend in OP.backends.items() if backend.why_not(**call) is None]


@pytest.mark.parametrize("cuts", [(1,), (16,), (17, 40), (0, 33, 64, 65, 99, 100)], ids=str)
def test_a_cut_anywhere_with_the_state_carried_is_no_cut(cuts):
    call = arguments(Case(time=100, heads=2, key=16, value=32))
    for backend in runnable(call):
        whole = contract.results(lambda backend=backend, **call: wkv7(backend=backend, **call), call)
        pieces = contract.results(lambda backend=backend, **call: in_pieces(backend, cuts, **call), call)
        contract.assert_within(pieces, whole, 1e-5, 3e-6)


def in_pieces(backend, cuts, *, state, cu_seqlens, **tensors):
    outputs = []
    for begin, end in zip((0, *cuts), (*cuts, 100)):
        piece = {name: x[:, begin:end] for name, x in tensors.items()}
        y, state = wkv7(**piece, state=state, cu_seqlens=cu_seqlens, backend=backend)
        outputs.append(y)
    return torch.cat(outputs, dim=1), state


def test_a_row_alone_is_the_row_in_the_batch():
    call = arguments(Case(batch=3, time=33))
    for backend in runnable(call):
        y, state = wkv7(**call, backend=backend)
        alone = {name: x[1:2] for name, x in contract.differentiable(call).items()}
        got = dict(zip("ys", wkv7(**alone, backend=backend)))
        contract.assert_within(got, {"y": y[1:2], "s": state[1:2]}, 1e-5, 1e-6)


def test_gradients_flow_from_the_state_alone_and_from_the_outputs_alone():
    call = arguments(Case(time=20))
    for backend in runnable(call):
        for which in (0, 1):
            leaves = {name: x.clone().requires_grad_() for name, x in contract.differentiable(call).items()}
            wkv7(**leaves, backend=backend)[which].sum().backward()
            wide = {name: x.double().requires_grad_() for name, x in contract.differentiable(call).items()}
            wkv7(**wide, backend="reference")[which].sum().backward()
            got = {name: leaves[name].grad for name in leaves if leaves[name].grad is not None}
            want = {name: wide[name].grad for name in got if wide[name].grad is not None}
            none = {name: x for name, x in got.items() if name not in want}
            contract.assert_within({name: got[name] for name in want}, want, 1e-5, 3e-6)
            assert all(x.count_nonzero() == 0 for x in none.values()), f"{backend}: {list(none)} have gradients"


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


@needs_native
@pytest.mark.parametrize("case", [Case(time=21), PACKED], ids=str)
def test_torch_finds_nothing_wrong_with_the_custom_operator(case):
    *tensors, cu_seqlens = arguments(case).values()
    tensors = [x.requires_grad_() for x in tensors]
    torch.library.opcheck(torch.ops.rookery.wkv7_native_forward.default, (*tensors, cu_seqlens, True, ""))


@needs_native
def test_a_compiled_graph_holds_the_operator_whole():
    call = arguments()
    leaves = {name: x.clone().requires_grad_() for name, x in contract.differentiable(call).items()}
    compiled = torch.compile(lambda **call: wkv7(**call), fullgraph=True, backend="aot_eager")
    y, state = compiled(**leaves)
    (y.sum() + state.sum()).backward()
    got = {"y": y.detach(), "state": state.detach(), "dr": leaves["r"].grad, "dstate": leaves["state"].grad}
    again = {name: x.clone().requires_grad_() for name, x in contract.differentiable(call).items()}
    y, state = wkv7(**again)
    (y.sum() + state.sum()).backward()
    want = {"y": y.detach(), "state": state.detach(), "dr": again["r"].grad, "dstate": again["state"].grad}
    contract.assert_within(got, want, 0, 0)


@needs_native
def test_the_number_of_threads_changes_no_bit():
    call = arguments(Case(time=40, heads=5))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = contract.results(OP.backends["native"].run, call)
        torch.set_num_threads(2)
        contract.assert_within(contract.results(OP.backends["native"].run, call), one, 0, 0)
    finally:
        torch.set_num_threads(before)


@needs_native
def test_native_is_the_first_choice_and_says_why_it_cannot_run():
    assert OP.pick(None, **arguments()).name == "native"
    refusals = {
        "value and key sizes are multiples of 16, these are 5 and 8": arguments(Case(key=8, value=5)),
        "it takes float32, bfloat16, a tensor has torch.float64": arguments(dtype=torch.float64),
        "it takes float32, a tensor has torch.bfloat16": arguments() | {"state": arguments()["state"].bfloat16()},
        "it runs on the CPU, a tensor is on meta": {
            name: x.to("meta") for name, x in contract.differentiable(arguments()).items()
        },
    }
    for reason, call in refusals.items():
        assert OP.backends["native"].why_not(**call) == reason


@needs_native
@pytest.mark.parametrize("cuts", [[1, 40], [0, 39], [0, 30, 20, 40]], ids=str)
def test_documents_that_are_not_the_row_are_refused(cuts):
    call = arguments(PACKED) | {"cu_seqlens": torch.tensor(cuts)}
    call["state"] = call["state"][: len(cuts) - 1]
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to 40 in a batch of 1; it is "):
        wkv7(**call, backend="native")


def test_a_state_of_the_wrong_shape_is_refused_with_the_right_one():
    call = arguments()
    call["state"] = call["state"].mT
    with pytest.raises(ValueError, match=r"state is \[2, 3, 32, 16\], expected \[rows, .*\] = \[2, 3, 16, 32\]"):
        wkv7(**call)
