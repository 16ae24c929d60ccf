"""What the compiled element-wise operators promise beside the contract: it is true that …"""

import importlib

import pytest
import torch
from support.contract import BUDGET, assert_within, differentiable, results

from rookery.errors import BackendUnavailable
from rookery.ops.dispatch import native_module
from rookery.ops.token_shift import token_shift
from rookery.ops.wkv7_inputs.reference import LOG_DECAY_SCALE

OPS = ["relu_squared", "token_shift", "wkv7_inputs", "wkv7_output"]
NATIVE = native_module()
if isinstance(NATIVE, str):
    pytest.skip(NATIVE, allow_module_level=True)
ISAS = NATIVE.available_isas()


def parts(op: str):
    package = importlib.import_module(f"rookery.ops.{op}")
    cases = importlib.import_module(f"rookery.ops.{op}.cases")
    return getattr(package.native, op), getattr(package.reference, op), cases


@pytest.mark.parametrize("op", OPS)
def test_the_number_of_threads_changes_no_bit(op):
    native, _, cases = parts(op)
    arguments = cases.make(cases.CASES[4], torch.Generator().manual_seed(1), torch.float32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = results(native, arguments)
        torch.set_num_threads(2)
        two = results(native, arguments)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one[name], two[name]) for name in one)


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
    got = results(native, arguments)
    assert got["gradient of mix"].dtype == torch.float32
    wide = arguments | {name: x.double() for name, x in differentiable(arguments).items()}
    assert_within(got, results(reference, wide), *BUDGET[torch.bfloat16])


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
