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
OWN = [name for name in OPERATORS if name != "wkv5"]
"""Operators with kernels of their own: wkv5 is wkv6."""


def chosen(op, number, case, dtype):
    """The cases of the recurrences that run in `dtype`, each as few as show all that its kernels do: programs are slow.

    Short calls of wkv7 run in float32, long ones in bfloat16, whose chunks are longer. The others are the same in all
    dtypes; wkv5 is wkv6.
    """
    if op == "taylor_attention":
        return case.time == 1  # its kernel is a step
    if op == "wkv5":
        return number == 0 and dtype == torch.float32
    if number == 0 or op not in ("bi_wkv", "wkv4", "wkv6", "wkv7"):
        return True
    if op == "wkv7":
        return bool(case.lengths) or (dtype == torch.float32) == (case.time <= 17)
    numbers = {"bi_wkv": (1, 8, 10), "wkv4": (1, 11, 12), "wkv6": (10, 12, 13)}[op]
    return dtype == torch.float32 and number in numbers


@pytest.mark.parametrize(
    ("op", "case", "dtype"),
    [
        pytest.param(op, case, dtype, id=f"{op}-{number}-{dtype}")
        for op in OPERATORS
        for dtype in (torch.float32, torch.bfloat16)
        for number, case in enumerate(contract.cases_of(op).CASES)
        if chosen(op, number, case, dtype)
    ],
)
def test_results_and_gradients_are_those_of_the_definition(op, case, dtype):
    arguments = contract.arguments_of(op, case, dtype)
    assert contract.op_named(op).backends["triton"].why_not(**arguments) is None
    contract.check(op, "triton", {}, case, dtype)


@pytest.mark.parametrize("op", OWN)
def test_float16_runs_too(op):
    contract.check(op, "triton", {}, contract.cases_of(op).CASES[0], torch.float16)


@pytest.mark.parametrize("op", OWN)
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


@pytest.mark.parametrize("op", OWN)
def test_a_compiled_graph_holds_the_operator_whole(op):
    run = contract.op_named(op).backends["triton"].run
    call = contract.arguments_of(op, contract.cases_of(op).CASES[0], torch.float32)
    compiled = torch.compile(lambda **call: run(**call), fullgraph=True, backend="aot_eager")
    contract.assert_within(contract.results(compiled, call), contract.results(run, call), 0, 0)


@pytest.mark.parametrize("op", OWN)
def test_torch_finds_nothing_wrong_with_the_custom_operator(op):
    recurrence = op in ("wkv4", "wkv6", "wkv7")
    case = contract.cases_of(op).CASES[0]
    if recurrence:
        width = {"channels": 8} if op == "wkv4" else {"heads": 1}
        case = contract.cases_of(op).Case(batch=1, time=20, lengths=(17, 3), **width)
    call = contract.arguments_of(op, case, torch.float32)
    if op == "taylor_attention":
        del call["cu_seqlens"]  # no packed documents in its kernel
    leaves = {name: x.requires_grad_() for name, x in contract.differentiable(call).items()}
    arguments = [x for x in (call | leaves).values() if not isinstance(x, str)]
    name = f"{op}_triton_forward" if recurrence else f"{op}_triton"
    arguments += [True] if recurrence else []
    torch.library.opcheck(getattr(torch.ops.rookery, name).default, arguments)


@pytest.mark.parametrize("op", ["wkv6", "wkv7"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("key", "value"), [(16, 48), (64, 64), (12, 5)])
def test_one_token_without_gradients_has_a_kernel_of_its_own(monkeypatch, op, key, value, dtype):
    case = contract.cases_of(op).Case(batch=2, time=1, heads=2, key=key, value=value)
    call = contract.arguments_of(op, case, dtype)
    wide = {name: x.double() for name, x in contract.differentiable(call).items()}
    monkeypatch.setattr(f"rookery.ops.{op}.triton._forward", None)
    got = dict(zip("ys", contract.op_named(op)(**call, backend="triton")))
    assert got["s"].dtype == torch.float32
    want = dict(zip("ys", contract.op_named(op).backends["reference"].run(**wide)))
    contract.assert_within(got, want, *contract.BUDGET[dtype])


@pytest.mark.parametrize("op", ["wkv4", "wkv6", "wkv7"])
def test_gradients_flow_from_the_state_alone_and_from_the_outputs_alone(op):
    width = {"channels": 8} if op == "wkv4" else {"heads": 1}
    call = contract.arguments_of(op, contract.cases_of(op).Case(batch=1, time=20, **width), torch.float32)
    for which in (0, 1):
        grads = []
        for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
            leaves = {n: x.detach().to(dtype).requires_grad_() for n, x in contract.differentiable(call).items()}
            result = contract.op_named(op).backends[backend].run(**leaves)[which]
            # of the state of wkv4, sums alone: what they are multiples of is no variable
            result = result[:, :2] if which == 1 and op == "wkv4" else result
            found = torch.autograd.grad(result.sum(), list(leaves.values()), materialize_grads=True)
            grads.append(dict(zip(leaves, found)))
        contract.assert_within(*grads, 1e-5, 3e-6)


@pytest.mark.parametrize("log_w", [0.0, -3e38, -float("inf")])
def test_exponents_of_wkv4_of_any_size_overflow_nowhere(log_w):
    case = contract.cases_of("wkv4").Case(batch=1, time=40, channels=8, fresh=True)
    call = contract.differentiable(contract.arguments_of("wkv4", case, torch.float32))
    call |= {"k": 1e30 * call["k"], "u": 1e30 * call["u"], "log_w": torch.full((8,), log_w)}
    results = contract.results(contract.op_named("wkv4").backends["triton"].run, call)
    assert all(x.isfinite().all() for x in results.values())


def test_a_key_that_repeats_is_solved_exactly():
    # the powers of (I − A_ab) reach 10¹⁷ here; a sum of powers would lose everything
    call = contract.arguments_of("wkv7", Case(batch=1, time=64, heads=1, decay=(0, 0)), torch.bfloat16)
    call["a"] = call["a"][:, :1].expand_as(call["a"])
    call["b"] = -call["a"]
    wide = {name: x.double() for name, x in contract.differentiable(call).items()}
    got, want = wkv7(**call, backend="triton"), wkv7(**wide, backend="reference")
    contract.assert_within(dict(zip("ys", got)), dict(zip("ys", want)), 2e-2, 1e-2)


@pytest.mark.parametrize("op", ["wkv4", "wkv5", "wkv6", "wkv7"])
@pytest.mark.parametrize("cuts", [[1, 40], [0, 39], [0, 30, 20, 40]], ids=str)
def test_documents_that_are_not_the_row_are_refused(op, cuts):
    call = contract.arguments_of(op, contract.cases_of(op).Case(batch=1, time=40), torch.float32)
    call |= {"cu_seqlens": torch.tensor(cuts)}
    call["state"] = torch.cat([call["state"]] * (len(cuts) - 1))
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to 40 in a batch of 1; it is "):
        contract.op_named(op)(**call, backend="triton")


def test_calls_of_wkv6_that_the_kernels_cannot_take_are_refused_with_the_reason():
    case = contract.cases_of("wkv6").Case
    call = contract.arguments_of("wkv6", case(), torch.float32)
    refusals = {
        "value and key sizes are at most 128, these are 144 and 32": contract.arguments_of(
            "wkv6", case(value=144), torch.float32
        ),
        "it takes float32, a tensor has torch.bfloat16": call | {"state": call["state"].bfloat16()},
        "it takes r, k and v of one dtype, these have bfloat16 and float32": call | {"v": call["v"].bfloat16()},
    }
    for reason, refused in refusals.items():
        with pytest.raises(BackendUnavailable, match=f"wkv6: backend 'triton' cannot run: {reason}"):
            contract.op_named("wkv6")(**refused, backend="triton")


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
