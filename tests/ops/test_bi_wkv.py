"""Bi-WKV beyond the contract of all operators (test_contract.py): it is true that …"""

import pytest
import torch
from support import contract

from rookery.errors import BackendUnavailable
from rookery.ops.bi_wkv import OP, bi_wkv, chunked
from rookery.ops.bi_wkv.cases import Case
from rookery.ops.dispatch import native_module

needs_native = pytest.mark.skipif(isinstance(native_module(), str), reason=str(native_module()))


def arguments(dtype=torch.float32, **settings):
    return contract.arguments_of("bi_wkv", Case(**settings), dtype)


def runnable(call):
    return [name for name, backend in OP.backends.items() if backend.why_not(**call) is None]


def test_the_definition_is_the_published_quotient_of_sums():
    call = arguments(torch.float64, batch=1, time=9, channels=4)
    omega, mu, k, v = (call[name] for name in ("omega", "mu", "k", "v"))
    y = bi_wkv(**call, backend="reference")
    for t in range(9):
        weights = [mu if i == t else -omega * (abs(t - i) - 1) for i in range(9)]
        weights = (torch.stack(weights) + k[0]).exp()
        torch.testing.assert_close(y[0, t], (weights * v[0]).sum(0) / weights.sum(0), rtol=1e-12, atol=1e-12)


def test_outputs_lie_between_the_values_and_those_of_one_token_are_its_own():
    for time in (1, 50):
        call = arguments(time=time, channels=20)
        for backend in runnable(call):
            y = bi_wkv(**call, backend=backend)
            assert (y <= call["v"].amax(1, keepdim=True) + 1e-6).all()
            assert (y >= call["v"].amin(1, keepdim=True) - 1e-6).all()
            same = call | {"v": torch.full_like(call["v"], 0.7)}
            torch.testing.assert_close(bi_wkv(**same, backend=backend), same["v"], rtol=1e-6, atol=0)
            assert time > 1 or torch.equal(y, call["v"])


@pytest.mark.parametrize("shift", [-300.0, 7.0, 300.0])
def test_the_same_number_on_all_keys_changes_nothing(shift):
    call = arguments(time=40)
    for backend in runnable(call):
        moved = bi_wkv(**call | {"k": call["k"] + shift}, backend=backend)
        torch.testing.assert_close(moved, bi_wkv(**call, backend=backend), rtol=1e-3, atol=1e-4)


def test_reversed_tokens_have_reversed_outputs_but_not_from_the_released_kernel():
    call = arguments(time=47)
    turned = call | {"k": call["k"].flip(1), "v": call["v"].flip(1)}
    for backend in runnable(call):
        y = bi_wkv(**turned, backend=backend).flip(1)
        torch.testing.assert_close(y, bi_wkv(**call, backend=backend), rtol=1e-5, atol=1e-5)
    released = bi_wkv(**turned | {"compat": "cuda32"}).flip(1) - bi_wkv(**call | {"compat": "cuda32"})
    assert released.abs().max() > 1e-3


def test_without_decay_and_bonus_all_outputs_are_one_average():
    call = arguments(time=33) | {"omega": torch.zeros(24), "mu": torch.zeros(24)}
    want = (call["k"].softmax(1) * call["v"]).sum(1, keepdim=True).expand_as(call["v"])
    for backend in runnable(call):
        torch.testing.assert_close(bi_wkv(**call, backend=backend), want, rtol=1e-5, atol=1e-5)


def test_a_strong_decay_leaves_the_token_and_its_neighbours():
    call = arguments(time=12, decay=(480.0, 480.0))
    k, v = call["k"], call["v"]
    outside = torch.zeros_like(v[:, :1])
    weights = torch.stack([torch.cat([outside, k[:, :-1].exp()], 1), (k + call["mu"]).exp()])
    weights = torch.cat([weights, torch.cat([k[:, 1:].exp(), outside], 1)[None]])
    values = torch.stack([torch.cat([outside, v[:, :-1]], 1), v, torch.cat([v[:, 1:], outside], 1)])
    for backend in runnable(call):
        y = bi_wkv(**call, backend=backend)
        torch.testing.assert_close(y, (weights * values).sum(0) / weights.sum(0), rtol=1e-4, atol=1e-5)


def test_the_same_parameter_means_the_same_weights_at_any_resolution():
    # the weight of a fourth of the row away, in rows of 64 and 256 tokens of equal keys
    away = []
    for tokens in (64, 256):
        omega, k = torch.full((1,), 3.0 / tokens), torch.zeros(1, tokens, 1)
        v = torch.zeros(1, tokens, 1)
        v[0, tokens // 4] = tokens
        away.append(float(bi_wkv(omega=omega, mu=torch.zeros(1), k=k, v=v)[0, tokens // 2, 0]))
    assert abs(away[0] / away[1] - 1) < 0.05


@pytest.mark.parametrize("backend", ["cumsum", "chunked", "reference"])
def test_gradients_are_those_of_finite_differences(backend):
    call = contract.differentiable(arguments(torch.float64, batch=2, time=5, channels=3))
    run = lambda *given: bi_wkv(**dict(zip(call, given)), backend=backend)  # noqa: E731
    assert torch.autograd.gradcheck(run, [x.requires_grad_() for x in call.values()])


@pytest.mark.parametrize("chunk", [1, 7, 50, 64])
def test_the_chunked_backend_does_not_depend_on_the_size_of_its_chunks(chunk):
    case = Case(time=50)
    got = contract.results(chunked.bi_wkv, contract.arguments_of("bi_wkv", case, torch.float64), chunk=chunk)
    contract.assert_within(got, contract.expected("bi_wkv", case, torch.float64), 1e-9, 1e-12)


@pytest.mark.parametrize("scale", [1e2, 1e4, 1e30])
def test_keys_of_any_size_overflow_nowhere(scale):
    call = arguments(time=70)
    for k in (scale * call["k"].sign(), scale * call["k"], torch.full_like(call["k"], scale)):
        for backend in runnable(call):
            results = contract.results(OP.backends[backend].run, call | {"k": k})
            assert all(x.isfinite().all() for x in results.values()), backend


def test_many_tokens_in_bfloat16_and_float32_are_those_in_float64():
    call = arguments(torch.bfloat16, batch=1, time=4096, channels=16)
    wide = {name: x.double() for name, x in contract.differentiable(call).items()}
    want = bi_wkv(**wide, backend="cumsum")
    for backend in [name for name in runnable(call) if name != "reference"]:
        narrow = bi_wkv(**call, backend=backend)
        assert narrow.dtype == torch.bfloat16
        torch.testing.assert_close(narrow.double(), want, rtol=4e-3, atol=1e-4)
        single = {name: x.float() for name, x in contract.differentiable(call).items()}
        torch.testing.assert_close(bi_wkv(**single, backend=backend).double(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("tokens", "low", "high"), [(16, 5e-3, 6e-2), (64, 1e-3, 1e-2), (196, 2e-4, 2e-3)])
def test_the_released_kernel_is_off_by_less_the_more_tokens_there_are(tokens, low, high):
    generator = torch.Generator().manual_seed(5)
    k, v = (torch.randn(4, tokens, 64, generator=generator, dtype=torch.float64) for _ in range(2))
    for decay in (-5.0, -1.0, 1.0, 3.0):
        call = {"omega": torch.full((64,), decay / tokens), "mu": torch.zeros(64), "k": 1.5 * k, "v": v}
        exact, released = bi_wkv(**call), bi_wkv(**call, compat="cuda32")
        error = float((exact - released).square().mean().sqrt() / exact.std())
        assert low < error < high, decay


@pytest.mark.parametrize("omega", [0.03, -0.05, 0.3])
@pytest.mark.parametrize("tokens", [5, 70])
def test_the_released_variant_is_the_exact_recurrence_from_seeds_with_one_factor_too_many(tokens, omega):
    k, v = torch.randn(2, tokens, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    length, mu, outputs = -(-tokens // 32), 0.2, []
    place, rise = torch.arange(tokens), torch.tensor(omega, dtype=torch.float64).exp()
    pairs = k.exp()[:, None] * torch.stack([v, torch.ones_like(v)], dim=1)  # what is summed: e^k v and e^k
    for start in range(0, tokens, length):
        weights = (-omega * (place - start).abs()).exp()[:, None] * pairs
        past, future = weights[:start].sum(0), weights[start + 1 :].sum(0)
        for t in range(start, min(start + length, tokens)):
            weighted, total = past + future + torch.tensor(mu).exp() * pairs[t]
            outputs.append(weighted / total)
            past = past / rise + pairs[t]
            future = rise * (future - pairs[min(t + 1, tokens - 1)])
    call = {"omega": torch.tensor([omega]), "mu": torch.tensor([mu]), "k": k[None, :, None], "v": v[None, :, None]}
    # its 1e-6 in the denominator is not here
    torch.testing.assert_close(bi_wkv(**call, compat="cuda32")[0, :, 0], torch.stack(outputs), rtol=1e-5, atol=1e-5)


def test_only_the_definition_computes_the_released_variant():
    call = arguments(time=40, compat="cuda32")
    assert OP.pick(None, **call).name == "reference"
    with pytest.raises(BackendUnavailable, match="bi_wkv: backend 'chunked' cannot run: it computes the exact"):
        bi_wkv(**call, backend="chunked")
    with pytest.raises(ValueError, match='compat is \'cuda\', expected "exact" or "cuda32"'):
        bi_wkv(**call | {"compat": "cuda"})


def test_a_decay_too_strong_for_sums_over_the_row_is_refused_by_name_and_goes_to_chunks():
    call = arguments(time=40, decay=(50.0, 50.0))
    with pytest.raises(BackendUnavailable, match="omega times the number of tokens, or mu, goes up to 50"):
        bi_wkv(**call, backend="cumsum")
    assert OP.pick(None, **call | {"k": call["k"].double()}).name == "cumsum"
    assert OP.pick(None, **call | {"k": call["k"].double(), "omega": 10 * call["omega"]}).name == "chunked"


def test_shapes_that_do_not_fit_are_named():
    call = arguments(time=4)
    for wrong in ({"omega": torch.zeros(3)}, {"v": torch.zeros(2, 4, 3)}, {"mu": torch.zeros(1, 24)}):
        with pytest.raises(ValueError, match=r"bi_wkv takes omega and mu \[c\], k and v \[b, t, c\]; these are"):
            bi_wkv(**call | wrong)


@pytest.mark.parametrize("backend", ["cumsum", pytest.param("native", marks=needs_native)])
def test_torch_finds_nothing_wrong_with_the_custom_operators(backend):
    tensors = [x.requires_grad_() for x in contract.differentiable(arguments(time=9)).values()]
    more = [""] if backend == "native" else []
    torch.library.opcheck(getattr(torch.ops.rookery, f"bi_wkv_{backend}").default, (*tensors, *more))


def test_a_compiled_graph_holds_the_operator_whole():
    call = contract.differentiable(arguments(time=9))
    compiled = torch.compile(lambda **call: bi_wkv(**call), fullgraph=True, backend="aot_eager")
    contract.assert_within(contract.results(compiled, call), contract.results(bi_wkv, call), 0, 0)


@needs_native
def test_the_number_of_threads_changes_no_bit():
    call, before = arguments(time=40, channels=200), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = contract.results(OP.backends["native"].run, call)
        torch.set_num_threads(2)
        contract.assert_within(contract.results(OP.backends["native"].run, call), one, 0, 0)
    finally:
        torch.set_num_threads(before)
