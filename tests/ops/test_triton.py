"""The Triton backends: it is true that …

Without a GPU the kernels run under Triton's interpreter; marked `gpu`, the same cases run as they are.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from support import contract

from rookery.errors import BackendUnavailable
from rookery.ops import dispatch

OPERATORS = [name for name in contract.operators() if "triton" in contract.op_named(name).backends]
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


@needs_triton
@pytest.mark.parametrize("chosen", ["wkv7", "not wkv7"])
def test_kernels_agree_with_the_definitions_under_the_interpreter(chosen):
    run_alone("triton_interpreted.py", "-k", chosen, TRITON_INTERPRET="1")


@needs_triton
def test_kernels_compile_for_a_gpu_that_is_not_here(tmp_path):
    run_alone("triton_compiled.py", TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0")


def run_alone(name, *options, **environment):
    """Runs a file of tests in a process of its own; none may be skipped."""
    file = Path(__file__).with_name(name)
    command = [sys.executable, "-m", "pytest", str(file), "-p", "no:cacheprovider", *options]
    ran = subprocess.run(command, env=os.environ | environment, cwd=file.parents[2], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert " passed" in ran.stdout
    assert "skipped" not in ran.stdout


@pytest.mark.parametrize("op", OPERATORS)
def test_tensors_on_the_cpu_are_refused_without_importing_triton(op):
    arguments = contract.arguments_of(op, contract.cases_of(op).CASES[0], torch.float32)
    with pytest.raises(BackendUnavailable, match=f"{op}: backend 'triton' cannot run: it runs on cuda, a tensor is on"):
        contract.op_named(op)(backend="triton", **arguments)


def test_a_missing_triton_is_named_with_the_extra_that_brings_it(monkeypatch):
    monkeypatch.setattr(dispatch, "_TRITON_FOUND", False)
    assert dispatch.triton_why_not(dtypes=()) == 'Triton is not installed; pip install "rookery[gpu]"'


def test_operators_can_be_imported_without_triton_and_do_not_import_it():
    modules = ", ".join(f"rookery.ops.{op}" for op in OPERATORS)
    code = f"import sys; sys.modules['triton'] = None; import {modules}; del sys.modules['triton']"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("op", "case", "dtype"),
    [
        pytest.param(op, case, dtype, id=f"{op}-{number}-{dtype}")
        for op in OPERATORS
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
        for number, case in enumerate(contract.cases_of(op).CASES)
        if getattr(case, "compat", "exact") == "exact"  # only the definition computes bi_wkv's other variant
    ],
)
def test_kernels_agree_with_the_definitions_on_a_gpu(op, case, dtype):
    arguments = contract.arguments_of(op, case, dtype, "cuda")
    assert contract.op_named(op).pick(None, **arguments).name == "triton"
    contract.check(op, "triton", {}, case, dtype, "cuda")


@pytest.mark.gpu
def test_one_token_on_a_gpu_is_that_of_the_definition():
    from rookery.ops.wkv7.cases import Case

    call = contract.arguments_of("wkv7", Case(time=1, key=64, value=64), torch.bfloat16, "cuda")
    got = dict(zip("ys", contract.op_named("wkv7")(**call)))
    wide = {name: x.double() for name, x in contract.differentiable(call).items()}
    want = dict(zip("ys", contract.op_named("wkv7").backends["reference"].run(**wide)))
    contract.assert_within(got, want, *contract.BUDGET[torch.bfloat16])
