"""Compiles Triton's kernels for an H100 on a machine without a GPU. test_triton.py runs this file by itself.

The interpreter takes much that the compiler refuses. Everything up to the launch is what happens on a GPU.
"""

import pytest
import torch
from support import contract
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from rookery.ops.token_shift.cases import Case as ShiftCase
from rookery.ops.wkv7.cases import Case as Wkv7Case

SHARED_MEMORY = 232448
"""Bytes that a program may have on an H100 or H200."""
CALLS = [
    ("taylor_attention", contract.cases_of("taylor_attention").CASES[0]),
    *[(op, contract.cases_of(op).CASES[0]) for op in ("relu_squared", "token_shift", "wkv7_inputs", "wkv7_output")],
    ("token_shift", ShiftCase(batch=1, time=9, lengths=(4, 5))),
    ("bi_wkv", contract.cases_of("bi_wkv").CASES[0]),
    *[("wkv4", contract.cases_of("wkv4").CASES[number]) for number in (0, 12)],
    *[(op, contract.cases_of("wkv6").Case(key=64, value=64)) for op in ("wkv5", "wkv6")],
    ("wkv6", contract.cases_of("wkv6").CASES[13]),
    ("wkv7", Wkv7Case(key=64, value=64)),
    ("wkv7", Wkv7Case(batch=1, time=40, heads=1, key=16, value=64, lengths=(0, 33, 7))),
]


class Hopper:
    """What Triton asks its driver before it compiles."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


driver.set_active(Hopper())


@pytest.fixture
def compiled(monkeypatch):
    """The kernels that were compiled instead of launched, by name."""
    kernels, run = {}, JITFunction.run

    def compile_only(self, *arguments, grid, warmup, **settings):
        assert len(grid) == 1
        assert 0 < grid[0] < 2**31
        kernels[self.__name__] = run(self, *arguments, grid=grid, warmup=True, **settings)

    monkeypatch.setattr(JITFunction, "run", compile_only)
    return kernels


@pytest.mark.parametrize(("op", "case"), CALLS, ids=str)
def test_kernels_compile_and_fit_on_the_chip(op, case, compiled):
    call = contract.arguments_of(op, case, torch.bfloat16)
    contract.results(contract.op_named(op).backends["triton"].run, call)
    # a step of decoding has its gradient in plain torch
    assert op == "taylor_attention" or any("backward" in name or "gradients" in name for name in compiled)
    assert all(kernel.metadata.shared <= SHARED_MEMORY for kernel in compiled.values())


def test_chunks_of_wkv7_are_multiplied_by_tensor_cores(compiled):
    call = contract.arguments_of("wkv7", Wkv7Case(key=64, value=64), torch.bfloat16)
    contract.results(contract.op_named("wkv7").backends["triton"].run, call)
    assert len(compiled) == 6
    assert all("wgmma.mma_async" in kernel.asm["ptx"] for kernel in compiled.values())


@pytest.mark.parametrize("op", ["wkv6", "wkv7"])
def test_one_token_compiles(op, compiled):
    call = contract.arguments_of(op, contract.cases_of(op).Case(time=1, key=64, value=64), torch.bfloat16)
    contract.op_named(op).backends["triton"].run(**call)
    assert list(compiled) == ["step"]
