"""What the recurrences have in common, beyond the contract of all operators (test_contract.py): it is true that …"""

import importlib

import pytest
import torch
from support import contract

from rookery.ops.dispatch import native_module

needs_native = pytest.mark.skipif(isinstance(native_module(), str), reason=str(native_module()))
TOKENS = {"wkv4": "k v", "wkv5": "r k v", "wkv6": "r log_w k v", "wkv7": "r log_w k v a b"}
"""Operator -> its arguments that have a row for every token; the others are one for all, or the state."""

pytestmark = pytest.mark.parametrize("op", TOKENS)


def arguments(op, dtype=torch.float32, **settings):
    sizes = {"channels": 48} if op == "wkv4" else {"key": 32, "value": 16}
    return contract.arguments_of(op, contract.cases_of(op).Case(**sizes, **settings), dtype)


def call_of(op):
    return getattr(importlib.import_module(f"rookery.ops.{op}"), op)


def runnable(op, call):
    return [name for name, backend in contract.op_named(op).backends.items() if backend.why_not(**call) is None]


def budget(op, backend):
    """Relative and of the largest, float32."""
    return getattr(contract.cases_of(op), "BUDGET", {}).get(backend, contract.BUDGET)[torch.float32]


def rows_of(op, call, rows):
    timed = TOKENS[op].split()
    return {name: x[rows] if name in timed or name == "state" else x for name, x in call.items() if x is not None}


@pytest.mark.parametrize("cuts", [(1,), (16,), (17, 40), (0, 33, 64, 65, 99, 100)], ids=str)
def test_a_cut_anywhere_with_the_state_carried_is_no_cut(op, cuts):
    call = arguments(op, time=100)
    for backend in runnable(op, call):
        whole = contract.results(lambda backend=backend, **call: call_of(op)(backend=backend, **call), call)
        pieces = contract.results(lambda backend=backend, **call: in_pieces(op, backend, cuts, **call), call)
        contract.assert_within(pieces, whole, *budget(op, backend))


def in_pieces(op, backend, cuts, *, state, **call):
    outputs = []
    for begin, end in zip((0, *cuts), (*cuts, 100)):
        piece = {name: x[:, begin:end] if name in TOKENS[op].split() else x for name, x in call.items()}
        y, state = call_of(op)(**piece, state=state, backend=backend)
        outputs.append(y)
    return torch.cat(outputs, dim=1), state


def test_a_row_alone_is_the_row_in_the_batch(op):
    call = arguments(op, batch=3, time=33)
    for backend in runnable(op, call):
        y, state = call_of(op)(**call, backend=backend)
        got = dict(zip("ys", call_of(op)(**rows_of(op, call, slice(1, 2)), backend=backend)))
        contract.assert_within(got, {"y": y[1:2], "s": state[1:2]}, 1e-5, 1e-6)


def test_left_out_the_state_is_that_before_any_token(op):
    call = arguments(op, time=7, fresh=True)
    without = {name: x for name, x in call.items() if name != "state"}
    for backend in runnable(op, call):
        for got, want in zip(call_of(op)(**without, backend=backend), call_of(op)(**call, backend=backend)):
            torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_gradients_flow_from_the_state_alone_and_from_the_outputs_alone(op):
    call = arguments(op, time=20)
    wide = {name: x.double() for name, x in contract.differentiable(call).items()}
    for which in (0, 1):
        want = grads_of(op, "reference", which, wide)
        for backend in runnable(op, call):
            got = grads_of(op, backend, which, contract.differentiable(call))
            contract.assert_within(got, want, *budget(op, backend))
            assert got["state"].any(), "the initial state has a gradient"


def grads_of(op, backend, which, call):
    leaves = {name: x.clone().requires_grad_() for name, x in call.items()}
    result = call_of(op)(**leaves, backend=backend)[which]
    # of the state of wkv4, sums alone: what they are multiples of is no variable
    result = result[:, :2] if which == 1 and op == "wkv4" else result
    grads = torch.autograd.grad(result.sum(), list(leaves.values()), materialize_grads=True)
    return dict(zip(leaves, grads, strict=True))


def test_the_sums_inside_are_float32_whatever_the_inputs(op):
    call = arguments(op, torch.bfloat16, time=200)
    wide = {name: x.double() for name, x in contract.differentiable(call).items()}
    want = grads_of(op, "reference", 0, wide)
    for backend in runnable(op, call):
        got = grads_of(op, backend, 0, contract.differentiable(call))
        # results in bfloat16 are rounded once; those in float32 have its precision
        narrow = {name for name, x in got.items() if x.dtype == torch.bfloat16}
        precise = got.keys() - narrow
        assert {"log_w", "state"} <= precise
        contract.assert_within({n: got[n] for n in narrow}, {n: want[n] for n in narrow}, 4e-3, 1e-5)
        contract.assert_within({n: got[n] for n in precise}, {n: want[n] for n in precise}, *budget(op, backend))


def test_tokens_that_no_document_contains_cannot_be_given(op):
    if "native" not in runnable(op, arguments(op)):
        pytest.skip("the compiled backend is what looks")
    for cuts in ([1, 40], [0, 39], [0, 30, 20, 40]):
        call = arguments(op, batch=1, time=40, lengths=(0,) * (len(cuts) - 1)) | {"cu_seqlens": torch.tensor(cuts)}
        with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to 40 in a batch of 1; it is "):
            call_of(op)(**call, backend="native")


@needs_native
@pytest.mark.parametrize("packed", [False, True])
def test_torch_finds_nothing_wrong_with_the_custom_operator(op, packed):
    call = arguments(op, **({"batch": 1, "time": 40, "lengths": (0, 7, 33)} if packed else {"time": 21}))
    *tensors, cu_seqlens = call.values()
    tensors = [x.requires_grad_() for x in tensors]
    # wkv5 is wkv6 with one decay for all tokens
    forward = getattr(torch.ops.rookery, f"{op.replace('5', '6')}_native_forward").default
    torch.library.opcheck(forward, (*tensors, cu_seqlens, True, ""))


@needs_native
def test_a_compiled_graph_holds_the_operator_whole(op):
    call = contract.differentiable(arguments(op))

    def run(function):
        leaves = {name: x.clone().requires_grad_() for name, x in call.items()}
        y, state = function(**leaves)
        (y.sum() + state.sum()).backward()
        return {"y": y.detach(), "state": state.detach()} | {f"d{name}": x.grad for name, x in leaves.items()}

    compiled = torch.compile(call_of(op), fullgraph=True, backend="aot_eager")
    contract.assert_within(run(compiled), run(call_of(op)), 0, 0)


@needs_native
def test_the_number_of_threads_changes_no_bit(op):
    sizes = {"channels": 300} if op == "wkv4" else {"heads": 5}
    call = contract.arguments_of(op, contract.cases_of(op).Case(time=40, **sizes), torch.float32)
    run, before = contract.op_named(op).backends["native"].run, torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = contract.results(run, call)
        torch.set_num_threads(2)
        contract.assert_within(contract.results(run, call), one, 0, 0)
    finally:
        torch.set_num_threads(before)


@needs_native
def test_native_is_the_first_choice_and_says_why_it_cannot_run(op):
    call = arguments(op)
    assert contract.op_named(op).pick(None, **call).name == "native"
    native = contract.op_named(op).backends["native"]
    refusals = {
        "it takes float32, bfloat16, a tensor has torch.float64": arguments(op, torch.float64),
        "it takes float32, a tensor has torch.bfloat16": call | {"state": call["state"].bfloat16()},
        "it runs on the CPU, a tensor is on meta": {n: x.to("meta") for n, x in contract.differentiable(call).items()},
    }
    for reason, refused in refusals.items():
        assert native.why_not(**refused) == reason


def test_a_state_of_the_wrong_shape_is_refused_with_the_right_one(op):
    call = arguments(op)
    call["state"] = call["state"].mT
    shapes = r"\[2, 48, 3\], expected \[rows, 3, c\] = \[2, 3, 48\]"
    if op != "wkv4":
        shapes = r"\[2, 3, 32, 16\], expected \[rows, head, value, key\] = \[2, 3, 16, 32\]"
    with pytest.raises(ValueError, match="state is " + shapes):
        call_of(op)(**call)


def test_heads_that_fill_no_vector_are_left_to_another_backend(op):
    if op == "wkv4":
        assert "native" in runnable(op, arguments(op)) or isinstance(native_module(), str)
        return
    call = contract.arguments_of(op, contract.cases_of(op).Case(key=8, value=5), torch.float32)
    if not isinstance(native_module(), str):
        reason = contract.op_named(op).backends["native"].why_not(**call)
        assert reason == "value and key sizes are multiples of 16, these are 5 and 8"
    assert call_of(op)(**call)[0].isfinite().all()
