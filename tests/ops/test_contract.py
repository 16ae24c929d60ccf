"""Every operator, backend and case against the operator's definition: it is true that …"""

import pytest
import torch
from support import contract


@pytest.mark.parametrize("op", contract.operators())
def test_every_operator_has_cases_and_a_definition_to_fall_back_on(op):
    assert contract.cases_of(op).CASES
    assert list(contract.op_named(op).backends)[-1] == "reference"


@pytest.mark.parametrize(("op", "backend", "options", "case", "dtype"), contract.calls())
def test_results_and_gradients_are_those_of_the_definition(op, backend, options, case, dtype):
    contract.check(op, backend, options, case, dtype)


@pytest.mark.parametrize("dtype", contract.DTYPES, ids=str)
@pytest.mark.parametrize("op", contract.operators())
def test_backends_agree_on_dtypes_with_and_without_gradients(op, dtype):
    arguments = contract.arguments_of(op, contract.cases_of(op).CASES[0], dtype)
    found = {}
    for backend in contract.op_named(op).backends.values():
        if backend.why_not(**arguments):
            continue
        recorded = contract.results(backend.run, arguments)
        with torch.no_grad():
            plain = backend.run(**arguments)
        plain = plain if isinstance(plain, tuple) else (plain,)
        for i, result in enumerate(plain):
            assert torch.equal(result, recorded[f"result {i}"]), f"{backend.name}: result {i} depends on gradients"
        found[backend.name] = {name: (x.dtype, x.shape) for name, x in recorded.items()}
    assert all(dtypes == found["reference"] for dtypes in found.values()), found


@pytest.mark.parametrize("op", contract.operators())
def test_tensors_may_lie_in_memory_in_any_order_and_are_not_changed(op):
    straight = contract.arguments_of(op, contract.cases_of(op).CASES[0], torch.float32)
    crooked = straight | {
        name: x.mT.contiguous().mT if x.dim() > 1 else torch.stack([x, x], dim=-1)[..., 0]
        for name, x in contract.differentiable(straight).items()
    }
    for backend in contract.op_named(op).backends.values():
        if backend.why_not(**straight):
            continue
        before = {name: x.clone() for name, x in contract.differentiable(straight).items()}
        first = contract.results(backend.run, straight)
        with torch.no_grad():
            backend.run(**straight)
        assert all(torch.equal(straight[name], x) for name, x in before.items()), backend.name
        contract.assert_within(contract.results(backend.run, crooked), first, 1e-5, 1e-6)


@pytest.mark.parametrize("op", contract.operators())
def test_a_backend_nobody_wrote_is_refused_with_the_number_of_those_there_are(op):
    arguments = contract.arguments_of(op, contract.cases_of(op).CASES[0], torch.float32)
    with pytest.raises(ValueError, match=f"no backend of {op} named 'referense'. Did you mean 'reference'"):
        contract.op_named(op)(backend="referense", **arguments)
