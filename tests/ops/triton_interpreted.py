"""Triton's kernels on the CPU, under its interpreter. test_triton.py runs this file in a process of its own.

The interpreter is chosen by the environment when a kernel is first defined, for all of a process.
"""

import pytest
import torch
from support import contract, triton_interpreter

from rookery.errors import BackendUnavailable
from rookery.ops.wkv7 import wkv7
from rookery.ops.wkv7.cases import Case

triton_interpreter.repair()
OPERATORS = [name for name in contract.operators() if "triton" in contract.op_named(name).backends]


def chosen(op, case, dtype):
    """Short calls of wkv7 run in float32, long ones in bfloat16, whose chunks are longer: programs take their time."""
    if op != "wkv7" or case.lengths or case == Case():
        return True
    return (dtype == torch.float32) == (case.time <= 17)


@pytest.mark.parametrize(
    ("op", "case", "dtype"),
    [
        pytest.param(op, case, dtype, id=f"{op}-{number}-{dtype}")
        for op in OPERATORS
        for dtype in (torch.float32, torch.bfloat16)
        for number, case in enumerate(contract.cases_of(op).CASES)
        if chosen(op, case, dtype)
    ],
)
def test_results_and_gradients_are_those_of_the_definition(op, case, dtype):
    arguments = contract.arguments_of(op, case, dtype)
    assert contract.op_named(op).backends["triton"].why_not(**arguments) is None
    contract.check(op, "triton", {}, case, dtype)


@pytest.mark.parametrize("op", OPERATORS)
def test_float16_runs_too(op):
    contract.check(op, "triton", {}, contract.cases_of(op).CASES[0], torch.float16)


@pytest.mark.parametrize("op", OPERATORS)
def test_results_do_not_depend_on_gradients_or_on_the_order_in_memory(op):
    run = contract.op_named(op).backends["triton"].run
    straight = contract.arguments_of(op, contract.cases_of(op).CASES[0], torch.float32)
    recorded = contract.results(run, straight)
    crooked = {
        name: x.mT.contiguous().mT if x.dim() > 1 else torch.stack([x, x], dim=-1)[..., 0]
        for name, x in contract.differentiable(straight).items()
    }
    with torch.no_grad():
        plain = run(**straight | crooked)
    for i, result in enumerate(plain if isinstance(plain, tuple) else (plain,)):
        assert torch.equal(result, recorded[f"result {i}"]), f"result {i}"


@pytest.mark.parametrize("op", OPERATORS)
def test_a_compiled_graph_holds_the_operator_whole(op):
    run = contract.op_named(op).backends["triton"].run
    call = contract.arguments_of(op, contract.cases_of(op).CASES[0], torch.float32)
    compiled = torch.compile(lambda **call: run(**call), fullgraph=True, backend="aot_eager")
    contract.assert_within(contract.results(compiled, call), contract.results(run, call), 0, 0)


@pytest.mark.parametrize("op", OPERATORS)
def test_torch_finds_nothing_wrong_with_the_custom_operator(op):
    case = Case(batch=1, time=20, heads=1, lengths=(17, 3)) if op == "wkv7" else contract.cases_of(op).CASES[0]
    call = contract.arguments_of(op, case, torch.float32)
    leaves = {name: x.requires_grad_() for name, x in contract.differentiable(call).items()}
    arguments = list((call | leaves).values())
    name = "wkv7_triton_forward" if op == "wkv7" else f"{op}_triton"
    arguments += [True] if op == "wkv7" else []
    torch.library.opcheck(getattr(torch.ops.rookery, name).default, arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("key", "value"), [(16, 48), (64, 64), (12, 5)])
def test_one_token_of_wkv7_without_gradients_has_a_kernel_of_its_own(monkeypatch, key, value, dtype):
    call = contract.arguments_of("wkv7", Case(batch=2, time=1, heads=2, key=key, value=value), dtype)
    wide = {name: x.double() for name, x in contract.differentiable(call).items()}
    monkeypatch.setattr("rookery.ops.wkv7.triton._forward", None)
    got = dict(zip("ys", wkv7(**call, backend="triton")))
    assert got["s"].dtype == torch.float32
    want = dict(zip("ys", wkv7(**wide, backend="reference")))
    contract.assert_within(got, want, *contract.BUDGET[dtype])


def test_gradients_of_wkv7_flow_from_the_state_alone_and_from_the_outputs_alone():
    call = contract.arguments_of("wkv7", Case(batch=1, time=20, heads=1), torch.float32)
    for which in (0, 1):
        leaves = {name: x.clone().requires_grad_() for name, x in contract.differentiable(call).items()}
        wkv7(**leaves, backend="triton")[which].sum().backward()
        wide = {name: x.double().requires_grad_() for name, x in contract.differentiable(call).items()}
        wkv7(**wide, backend="reference")[which].sum().backward()
        want = {name: torch.zeros_like(x) if x.grad is None else x.grad for name, x in wide.items()}
        contract.assert_within({name: x.grad for name, x in leaves.items()}, want, 1e-5, 3e-6)


def test_a_key_that_repeats_is_solved_exactly():
    # the powers of (I − A_ab) reach 10¹⁷ here; a sum of powers would lose everything
    call = contract.arguments_of("wkv7", Case(batch=1, time=64, heads=1, decay=(0, 0)), torch.bfloat16)
    call["a"] = call["a"][:, :1].expand_as(call["a"])
    call["b"] = -call["a"]
    wide = {name: x.double() for name, x in contract.differentiable(call).items()}
    got, want = wkv7(**call, backend="triton"), wkv7(**wide, backend="reference")
    contract.assert_within(dict(zip("ys", got)), dict(zip("ys", want)), 2e-2, 1e-2)


@pytest.mark.parametrize("cuts", [[1, 40], [0, 39], [0, 30, 20, 40]], ids=str)
def test_documents_that_are_not_the_row_are_refused(cuts):
    call = contract.arguments_of("wkv7", Case(batch=1, time=40), torch.float32) | {"cu_seqlens": torch.tensor(cuts)}
    call["state"] = call["state"][:1].expand(len(cuts) - 1, -1, -1, -1)
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to 40 in a batch of 1; it is "):
        wkv7(**call, backend="triton")


def test_calls_that_the_kernels_cannot_take_are_refused_with_the_reason():
    call = contract.arguments_of("wkv7", Case(), torch.float32)
    refusals = {
        "value and key sizes are at most 128, these are 144 and 32": contract.arguments_of(
            "wkv7", Case(value=144), torch.float32
        ),
        "it takes float32, bfloat16, float16, a tensor has torch.float64": call | {"r": call["r"].double()},
        "it takes float32, a tensor has torch.bfloat16": call | {"state": call["state"].bfloat16()},
        "it takes r, k, v, a and b of one dtype, these have bfloat16 and float32": call | {"v": call["v"].bfloat16()},
        "it runs on cuda, a tensor is on meta": call | {"r": call["r"].to("meta")},
    }
    for reason, refused in refusals.items():
        with pytest.raises(BackendUnavailable, match=f"wkv7: backend 'triton' cannot run: {reason}"):
            wkv7(**refused, backend="triton")
    x = torch.zeros(1, 1, 4)
    with pytest.raises(BackendUnavailable, match="it takes tensors of one dtype, these have bfloat16 and float32"):
        contract.op_named("token_shift")(x=x, previous=x[0].bfloat16(), mix=x[0], cu_seqlens=None, backend="triton")
