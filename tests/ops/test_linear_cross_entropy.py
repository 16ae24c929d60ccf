"""The head with its cross-entropy, in chunks: it is true that …"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rookery.errors import BackendUnavailable
from rookery.ops.dispatch import native_module
from rookery.ops.linear_cross_entropy import OP, chunked, linear_cross_entropy, native, reference
from rookery.ops.linear_cross_entropy.cases import CASES, Case, make

NATIVE = native_module()
if isinstance(NATIVE, str):
    pytest.skip(NATIVE, allow_module_level=True)
RUNS = {"chunked": (chunked.linear_cross_entropy, {})} | {
    f"native-{isa}": (native.linear_cross_entropy, {"isa": isa}) for isa in NATIVE.available_isas()
}
# of the largest value of each result. bfloat16 logits are rounded once, and so are their gradients
BUDGET = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2}


def run(function, arguments: dict, upstream: float = 3.0, **options) -> dict[str, torch.Tensor]:
    leaves = {name: arguments[name].detach().clone().requires_grad_() for name in ("features", "weight")}
    loss = function(**(arguments | leaves), **options)
    # not 1: the gradients must be scaled, the pull of l2wrap too
    grads = torch.autograd.grad(loss, list(leaves.values()), torch.full_like(loss, upstream))
    return {"loss": loss.detach(), "features": grads[0], "weight": grads[1]}


def arguments_of(case: Case, dtype: torch.dtype) -> dict:
    return make(case, torch.Generator().manual_seed(1), dtype)


def in_float64(arguments: dict) -> dict:
    return arguments | {name: arguments[name].double() for name in ("features", "weight")}


def assert_within(got: dict, want: dict, budget: float) -> None:
    for name, expected in want.items():
        allowed = budget * float(expected.abs().max())
        torch.testing.assert_close(
            got[name].double(),
            expected.double(),
            rtol=0,
            atol=allowed,
            msg=lambda message, name=name: f"{name}: {message}",
        )


@pytest.mark.parametrize("chunk", [1, 7])
@pytest.mark.parametrize(("dtype", "name"), [(torch.float64, "chunked"), *((torch.float32, name) for name in RUNS)])
@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_chunks_add_up_to_the_definition(case, dtype, name, chunk):
    function, options = RUNS[name]
    arguments = arguments_of(case, dtype)
    want = run(reference.linear_cross_entropy, in_float64(arguments))
    assert_within(run(function, arguments, chunk=chunk, **options), want, BUDGET[dtype])


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("case", [case for case in CASES if case.logit_scale == 1], ids=str)
def test_bfloat16_stays_within_its_budget_chunk_by_chunk(case, name):
    function, options = RUNS[name]
    arguments = arguments_of(case, torch.bfloat16)
    got = run(function, arguments, chunk=7, **options)
    assert {x: got[x].dtype for x in got} == {
        "loss": torch.float32,
        "features": torch.bfloat16,
        "weight": torch.bfloat16,
    }
    assert_within(got, run(reference.linear_cross_entropy, in_float64(arguments)), BUDGET[torch.bfloat16])


def test_the_gradient_of_the_weight_adds_up_in_float32():
    # 4096 equal tokens: a sum in bfloat16 stops growing after 256 of them
    arguments = arguments_of(Case(tokens=1, vocabulary=5), torch.bfloat16)
    arguments["features"] = arguments["features"].expand(4096, -1)
    arguments["targets"] = arguments["targets"].expand(4096)
    for name in ("chunked", "native-portable"):
        function, options = RUNS[name]
        got = run(function, arguments, chunk=4, **options)
        assert_within(got, run(reference.linear_cross_entropy, in_float64(arguments)), BUDGET[torch.bfloat16])


@pytest.mark.parametrize("name", RUNS)
def test_equal_largest_logits_share_the_pull(name):
    function, options = RUNS[name]
    arguments = {
        "features": torch.ones(3, 4),
        "weight": torch.ones(6, 4),
        "targets": torch.tensor([0, 5, -100]),
        "ignore_index": -100,
        "l2wrap": 0.5,
    }
    want = run(reference.linear_cross_entropy, in_float64(arguments))
    assert_within(run(function, arguments, **options), want, BUDGET[torch.float32])


@pytest.mark.parametrize("name", RUNS)
def test_the_pull_does_not_change_the_loss(name):
    function, options = RUNS[name]
    arguments = arguments_of(CASES[2], torch.float32)
    assert torch.equal(function(**arguments, **options), function(**arguments | {"l2wrap": 0.0}, **options))


@pytest.mark.parametrize("name", RUNS)
def test_the_loss_is_not_a_number_and_pulls_nothing_when_every_target_is_ignored(name):
    function, options = RUNS[name]
    arguments = arguments_of(Case(), torch.float32) | {"targets": torch.full((10,), -100)}
    got, want = run(function, arguments, **options), run(reference.linear_cross_entropy, arguments)
    torch.testing.assert_close(got, want, equal_nan=True)
    assert got["loss"].isnan()


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        for x in tree_leaves(results):
            if torch.is_tensor(x):
                self.elements = max(self.elements, x.numel())
        return results


@pytest.mark.parametrize(("backend", "holds_all"), [("native", False), ("chunked", False), ("reference", True)])
def test_no_tensor_ever_holds_all_logits(backend, holds_all, monkeypatch):
    monkeypatch.setattr(chunked, "LOGITS", 1)
    monkeypatch.setattr(chunked, "LEAST_TOKENS", 64)
    case = Case(tokens=512, channels=8, vocabulary=300, l2wrap=1e-4)
    arguments = arguments_of(case, torch.float32)
    arguments["features"].requires_grad_()
    arguments["weight"].requires_grad_()
    with Largest() as largest:
        linear_cross_entropy(**arguments, backend=backend).backward()
    assert (largest.elements >= case.tokens * case.vocabulary) == holds_all
    assert largest.elements >= 64 * case.vocabulary


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("wanted", ["features", "weight"])
def test_a_frozen_side_costs_nothing_and_changes_nothing(name, wanted):
    function, options = RUNS[name]
    arguments = arguments_of(CASES[2], torch.float32)
    both = run(function, arguments, upstream=1.0, **options)
    arguments[wanted].requires_grad_()
    function(**arguments, **options).backward()
    other = "weight" if wanted == "features" else "features"
    assert torch.equal(arguments[wanted].grad, both[wanted])
    assert arguments[other].grad is None


@pytest.mark.parametrize("backend", ["native", "chunked"])
def test_a_target_beyond_the_vocabulary_is_refused(backend):
    arguments = arguments_of(Case(tokens=2, vocabulary=5), torch.float32) | {"targets": torch.tensor([1, 5])}
    with pytest.raises(IndexError, match="target 5 is not in the vocabulary of 5 tokens"):
        linear_cross_entropy(**arguments, backend=backend)


def test_torch_finds_nothing_wrong_with_the_custom_operator():
    logits, targets = torch.randn(4, 9), torch.tensor([0, 8, -100, 3])
    torch.library.opcheck(native.softmax_rows, (logits, targets, -100, 0.25, 0.1, True, ""))


def test_float64_goes_to_plain_torch_and_a_forced_backend_never_falls_back():
    wide, narrow = arguments_of(CASES[0], torch.float64), arguments_of(CASES[0], torch.float32)
    assert (OP.pick(None, **wide).name, OP.pick(None, **narrow).name) == ("chunked", "native")
    with pytest.raises(BackendUnavailable, match=r"a tensor has torch\.float64"):
        linear_cross_entropy(**wide, backend="native")
