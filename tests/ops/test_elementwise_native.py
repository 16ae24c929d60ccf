"""The compiled element-wise operators against their definitions in float64: it is true that …"""

import importlib

import pytest
import torch

from rookery.errors import BackendUnavailable
from rookery.ops.dispatch import native_module
from rookery.ops.token_shift import token_shift
from rookery.ops.wkv7_inputs.reference import LOG_DECAY_SCALE

OPS = ["relu_squared", "token_shift", "wkv7_inputs", "wkv7_output"]
NATIVE = native_module()
if isinstance(NATIVE, str):
    pytest.skip(NATIVE, allow_module_level=True)
ISAS = NATIVE.available_isas()
# float32: a few roundings of the largest value; bfloat16: results are rounded once, by 2⁻⁹ of themselves
BUDGET = {torch.float32: {"relative": 1e-5, "of_largest": 1e-6}, torch.bfloat16: {"relative": 4e-3, "of_largest": 1e-6}}


def parts(op: str):
    package = importlib.import_module(f"rookery.ops.{op}")
    cases = importlib.import_module(f"rookery.ops.{op}.cases")
    return getattr(package.native, op), getattr(package.reference, op), cases


def every_case():
    for op in OPS:
        for number, case in enumerate(parts(op)[2].CASES):
            yield pytest.param(op, case, id=f"{op}-{number}")


def differentiable(arguments: dict) -> dict[str, torch.Tensor]:
    return {name: x for name, x in arguments.items() if torch.is_tensor(x) and x.is_floating_point()}


def run(function, arguments: dict, **options) -> dict[str, torch.Tensor]:
    """Every result, and the gradient of a fixed random weighting of the results with respect to every tensor."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in differentiable(arguments).items()}
    results = function(**(arguments | leaves), **options)
    results = results if isinstance(results, tuple) else (results,)
    generator = torch.Generator().manual_seed(7)
    weights = [torch.randn(x.shape, generator=generator).bfloat16().to(x.dtype) for x in results]
    grads = torch.autograd.grad(results, list(leaves.values()), weights, materialize_grads=True)
    named = {f"result {i}": x.detach() for i, x in enumerate(results)}
    return named | {f"gradient of {name}": x for name, x in zip(leaves, grads)}


def in_float64(arguments: dict) -> dict:
    return arguments | {name: x.double() for name, x in differentiable(arguments).items()}


def assert_within(got: dict, want: dict, dtype: torch.dtype) -> None:
    budget = BUDGET[dtype]
    for name, expected in want.items():
        largest = float(expected.abs().max()) if expected.numel() else 0.0
        torch.testing.assert_close(
            got[name].double(),
            expected,
            rtol=budget["relative"],
            atol=budget["of_largest"] * largest,
            msg=lambda message, name=name: f"{name}: {message}",
        )


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", BUDGET, ids=str)
@pytest.mark.parametrize(("op", "case"), list(every_case()))
def test_results_and_gradients_are_those_of_the_definition(op, case, dtype, isa):
    native, reference, cases = parts(op)
    arguments = cases.make(case, torch.Generator().manual_seed(1), dtype)
    assert_within(run(native, arguments, isa=isa), run(reference, in_float64(arguments)), dtype)


@pytest.mark.parametrize("op", OPS)
def test_the_number_of_threads_changes_no_bit(op):
    native, _, cases = parts(op)
    arguments = cases.make(cases.CASES[4], torch.Generator().manual_seed(1), torch.float32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run(native, arguments)
        torch.set_num_threads(2)
        two = run(native, arguments)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("op", OPS)
def test_results_have_the_dtypes_of_the_definition(op):
    native, reference, cases = parts(op)
    arguments = cases.make(cases.CASES[0], torch.Generator().manual_seed(1), torch.bfloat16)
    got, want = run(native, arguments), run(reference, arguments)
    assert {name: (x.dtype, x.shape) for name, x in got.items()} == {
        name: (x.dtype, x.shape) for name, x in want.items()
    }


@pytest.mark.parametrize("op", OPS)
def test_tensors_may_lie_in_memory_in_any_order(op):
    native, _, cases = parts(op)
    arguments = cases.make(cases.CASES[0], torch.Generator().manual_seed(1), torch.float32)
    spread = {
        name: x.mT.contiguous().mT if x.dim() > 1 else torch.stack([x, x], dim=-1)[..., 0]
        for name, x in differentiable(arguments).items()
    }
    straight, crooked = run(native, arguments), run(native, arguments | spread)
    assert all(torch.equal(straight[name], crooked[name]) for name in straight)


@pytest.mark.parametrize("op", OPS)
def test_torch_finds_nothing_wrong_with_the_custom_operators(op):
    package = importlib.import_module(f"rookery.ops.{op}")
    arguments = parts(op)[2].make(parts(op)[2].CASES[0], torch.Generator().manual_seed(1), torch.float32)
    leaves = {name: x.requires_grad_() for name, x in differentiable(arguments).items()}
    torch.library.opcheck(package.native.forward, (*(arguments | leaves).values(), ""))


@pytest.mark.parametrize("op", OPS)
def test_float64_goes_to_the_definition_and_a_forced_backend_never_falls_back(op):
    package = importlib.import_module(f"rookery.ops.{op}")
    cases = parts(op)[2]
    wide = cases.make(cases.CASES[0], torch.Generator().manual_seed(1), torch.float64)
    assert package.OP.pick(None, **wide).name == "reference"
    with pytest.raises(BackendUnavailable, match=r"it takes float32, bfloat16, a tensor has torch\.float64"):
        package.OP(backend="native", **wide)
    narrow = cases.make(cases.CASES[0], torch.Generator().manual_seed(1), torch.float32)
    assert package.OP.pick(None, **narrow).name == "native"


def test_tensors_of_two_dtypes_are_refused_by_name():
    x, mix = torch.zeros(1, 2, 4), torch.zeros(1, 4)
    with pytest.raises(BackendUnavailable, match="it takes tensors of one dtype, these have bfloat16 and float32"):
        token_shift(x=x, mix=mix, previous=torch.zeros(1, 4, dtype=torch.bfloat16), backend="native")


def test_an_unknown_instruction_set_is_refused_with_a_list():
    native, _, _ = parts("relu_squared")
    with pytest.raises(ValueError, match="no instruction set 'sse9' on this machine; it has: portable"):
        native(x=torch.zeros(3), isa="sse9")


def test_parameters_may_be_float32_beside_bfloat16_activations():
    native, reference, cases = parts("token_shift")
    arguments = cases.make(cases.CASES[0], torch.Generator().manual_seed(1), torch.bfloat16)
    arguments["mix"] = torch.rand(arguments["mix"].shape, generator=torch.Generator().manual_seed(2))
    got = run(native, arguments)
    assert got["gradient of mix"].dtype == torch.float32
    assert_within(got, run(reference, in_float64(arguments)), torch.bfloat16)


@pytest.mark.parametrize("isa", ISAS)
def test_the_sigmoid_is_accurate_from_end_to_end(isa):
    native, _, _ = parts("wkv7_inputs")
    logits = torch.linspace(-80, 80, 200_001)[None, :, None]
    one = torch.ones(1)
    log_w, *_ = native(k=logits, decay_logit=logits, rate_logit=logits, k_k=one, k_a=one, head_dim=1, isa=isa)
    want = LOG_DECAY_SCALE * logits.double().sigmoid()
    assert ((log_w[..., 0].double() - want) / want).abs().max() < 4e-7


@pytest.mark.parametrize("isa", ISAS)
def test_what_is_not_a_number_stays_so(isa):
    nan = torch.tensor([float("nan")] * 17)
    assert parts("relu_squared")[0](x=nan, isa=isa).isnan().all()
    logits = nan[None, :, None]
    one = torch.ones(1)
    log_w, *_ = parts("wkv7_inputs")[0](
        k=logits, decay_logit=logits, rate_logit=logits, k_k=one, k_a=one, head_dim=1, isa=isa
    )
    assert log_w.isnan().all()
