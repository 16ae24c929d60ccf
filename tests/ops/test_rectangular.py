"""States whose values and keys differ in size, as upscaled start states have them: it is true that …"""

import pytest
import torch
from support import contract

from rookery.ops.wkv7 import wkv7
from rookery.ops.wkv7.cases import Case

LIFTED = Case(batch=3, time=41, heads=2, key=256, value=16)
"""A head of 16 channels and 256 features."""


def call_of(dtype, backend):
    call = contract.arguments_of("wkv7", LIFTED, dtype)
    if reason := contract.op_named("wkv7").backends[backend].why_not(**call):
        pytest.skip(reason)
    return call


@pytest.mark.parametrize(("backend", "dtype"), [("chunked", torch.float64), ("native", torch.float32)])
def test_a_start_state_shared_by_the_batch_gets_the_sum_of_the_rows_gradients(backend, dtype):
    call = call_of(dtype, backend)
    one = call.pop("state")[0].requires_grad_()
    weights = torch.randn(call["v"].shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64).to(dtype)
    y, _ = wkv7(**call, state=one.expand(3, *one.shape), backend=backend)
    (together,) = torch.autograd.grad((y * weights).sum(), one)
    alone = torch.zeros_like(one)
    for row in range(3):
        part = {name: x[row : row + 1] for name, x in call.items() if x is not None}
        y, _ = wkv7(**part, state=one[None], backend="reference")
        alone += torch.autograd.grad((y * weights[row : row + 1]).sum(), one)[0]
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(together, alone, rtol=tolerance, atol=tolerance * float(alone.abs().max()))


@pytest.mark.parametrize(("backend", "dtype"), [("chunked", torch.float64), ("native", torch.float32)])
@pytest.mark.parametrize("cut", [1, 7, 16, 17])
def test_pieces_give_the_whole(backend, dtype, cut):
    call = call_of(dtype, backend)
    state = call.pop("state")
    want, after = wkv7(**call, state=state, backend="reference")
    outputs = []
    for begin in range(0, LIFTED.time, cut):
        piece = {name: x[:, begin : begin + cut] for name, x in call.items() if x is not None}
        y, state = wkv7(**piece, state=state, backend=backend)
        outputs.append(y)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    torch.testing.assert_close(torch.cat(outputs, 1), want, rtol=tolerance, atol=tolerance * float(want.abs().max()))
    torch.testing.assert_close(state, after, rtol=tolerance, atol=tolerance * float(after.abs().max()))
