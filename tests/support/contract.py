"""What every operator is held to: each backend gives the results and all gradients of the definition in float64.

An operator is a package of rookery.ops with `OP`. Its `cases.py` has `CASES` (data, one call each) and
`make(case, generator, dtype)`, which gives the arguments by name; tensors that are not made in `dtype` (a state in
float32 beside bfloat16) are its own business. `BUDGET`, where a backend needs one of its own, maps its name to
{dtype: (relative, of the largest value)}.
"""

import importlib
import importlib.util
import inspect
import pkgutil
from functools import cache
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from rookery import ops
from rookery.errors import BackendUnavailable
from rookery.ops.dispatch import Op, native_module

DTYPES = (torch.float64, torch.float32, torch.bfloat16)
# float32: some roundings of the largest value; bfloat16: float32 inside, every result rounded once, by 2⁻⁹ of itself
# (float16 is a matter of GPUs)
BUDGET = {
    torch.float64: (1e-9, 1e-12),
    torch.float32: (1e-5, 3e-6),
    torch.bfloat16: (4e-3, 3e-6),
    torch.float16: (5e-4, 3e-6),
}


@cache
def operators() -> list[str]:
    """Names of all operators."""
    packages = [found.name for found in pkgutil.iter_modules(ops.__path__) if found.ispkg]
    return [name for name in packages if hasattr(importlib.import_module(f"rookery.ops.{name}"), "OP")]


def op_named(name: str) -> Op:
    return importlib.import_module(f"rookery.ops.{name}").OP


def cases_of(name: str) -> ModuleType:
    return importlib.import_module(f"rookery.ops.{name}.cases")


def arguments_of(name: str, case: Any, dtype: torch.dtype, device: str = "cpu") -> dict[str, Any]:
    """The same numbers for every dtype and device, up to rounding."""
    made = cases_of(name).make(case, torch.Generator().manual_seed(1), dtype)
    return {key: x.to(device) if torch.is_tensor(x) else x for key, x in made.items()}


def backends_of(name: str) -> list[tuple[str, dict[str, str]]]:
    """Backends with the options to run them with: a compiled one runs on every instruction set of this machine."""
    runs = []
    for backend in op_named(name).backends.values():
        if "isa" in inspect.signature(backend.run).parameters and not isinstance(native_module(), str):
            runs += [(backend.name, {"isa": isa}) for isa in native_module().available_isas()]
        else:
            runs.append((backend.name, {}))
    return runs


def calls() -> list:
    """Parameters (op, backend, options, case, dtype) of every operator × backend × case × dtype."""
    return [
        pytest.param(
            op, backend, options, case, dtype, id="-".join([op, backend, *options.values(), str(number), str(dtype)])
        )
        for op in operators()
        if importlib.util.find_spec(f"rookery.ops.{op}.cases")  # its absence is one failure, not that of all tests
        for backend, options in backends_of(op)
        for number, case in enumerate(cases_of(op).CASES)
        for dtype in DTYPES
        # definitions may round to bfloat16 between their steps; they define nothing but the float64 result
        if not (backend == "reference" and dtype == torch.bfloat16)
    ]


def check(op: str, backend: str, options: dict[str, str], case: Any, dtype: torch.dtype, device: str = "cpu") -> None:
    """Compares results and gradients with the definition; a backend that cannot run must say so when asked by name."""
    arguments = arguments_of(op, case, dtype, device)
    chosen = op_named(op).backends[backend]
    if reason := chosen.why_not(**arguments):
        with pytest.raises(BackendUnavailable) as raised:
            op_named(op)(backend=backend, **arguments)
        assert reason in str(raised.value)
        return
    got = results(chosen.run, arguments, **options)
    own = getattr(cases_of(op), "BUDGET", {}).get(backend, {})
    relative, of_largest = (BUDGET | own)[dtype]
    assert_within(got, expected(op, case, dtype), relative, of_largest)


@cache
def expected(op: str, case: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """Results and gradients of the definition, computed in float64 on numbers rounded to `dtype`."""
    arguments = arguments_of(op, case, dtype)
    wide = {name: x.double() for name, x in differentiable(arguments).items()}
    return results(op_named(op).backends["reference"].run, arguments | wide)


def differentiable(arguments: dict[str, Any]) -> dict[str, Tensor]:
    return {name: x for name, x in arguments.items() if torch.is_tensor(x) and x.is_floating_point()}


def results(run: Any, arguments: dict[str, Any], **options: str) -> dict[str, Tensor]:
    """Every result, and the gradient of a fixed random weighting of the results with respect to every tensor."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in differentiable(arguments).items()}
    given = run(**(arguments | leaves), **options)
    given = given if isinstance(given, tuple) else (given,)
    generator = torch.Generator().manual_seed(7)
    # representable in bfloat16, so that every dtype gets the same weights
    weights = [torch.randn(x.shape, generator=generator).bfloat16().to(x) for x in given]
    # a result without tokens may depend on nothing
    pairs = [(x, weight) for x, weight in zip(given, weights, strict=True) if x.requires_grad]
    outputs, weights = zip(*pairs, strict=True)
    grads = torch.autograd.grad(outputs, list(leaves.values()), weights, materialize_grads=True)
    named = {f"result {i}": x.detach() for i, x in enumerate(given)}
    return named | {f"gradient of {name}": x for name, x in zip(leaves, grads)}


def assert_within(got: dict[str, Tensor], want: dict[str, Tensor], relative: float, of_largest: float) -> None:
    """Every number differs by at most `relative` of itself plus `of_largest` of the largest of its tensor."""
    assert got.keys() == want.keys()
    for name, right in want.items():
        largest = float(right.abs().max()) if right.numel() else 0.0
        torch.testing.assert_close(
            got[name].to("cpu", torch.float64),
            right.to("cpu", torch.float64),
            rtol=relative,
            atol=of_largest * largest,
            msg=lambda message, name=name: f"{name}: {message}",
        )
