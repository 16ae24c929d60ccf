"""Taylor attention beyond the contract of all operators (hybrids.md 3.6): it is true that …"""

import pytest
import torch
from support.contract import arguments_of

from rookery.errors import BackendUnavailable
from rookery.ops.dispatch import native_module
from rookery.ops.taylor_attention import OP, taylor_attention
from rookery.ops.taylor_attention.cases import Case
from rookery.ops.taylor_attention.features import features, packed, size, unpacked

WIDE = torch.float64


def call(**sizes):
    return arguments_of("taylor_attention", Case(**sizes), WIDE)


@pytest.mark.parametrize("dim", [1, 2, 5, 16, 24])
def test_the_product_of_features_is_the_polynomial(dim):
    a, b = torch.randn(2, 40, dim, dtype=WIDE, generator=torch.Generator().manual_seed(dim))
    u = (a * b).sum(-1) / dim**0.5
    product = (features(a) * features(b)).sum(-1)
    assert features(a).shape[-1] == size(dim)
    torch.testing.assert_close(product, 1 + u + u**2 / 2, rtol=1e-12, atol=1e-12)
    assert product.min() >= 0.5


def test_the_published_feature_dimension_is_153_packed_and_273_unpacked():
    state = torch.randn(2, 3, 5, 153, dtype=WIDE, generator=torch.Generator().manual_seed(0))
    assert size(16) == 153
    assert unpacked(state, 16).shape[-1] == 273
    torch.testing.assert_close(packed(unpacked(state, 16), 16), state, rtol=1e-14, atol=0)


def test_a_packed_state_reads_as_the_published_one():
    q, k = torch.randn(2, 7, 16, dtype=WIDE, generator=torch.Generator().manual_seed(1))
    published = torch.cat([torch.ones(7, 1), q / 2, (q[:, :, None] * q[:, None]).flatten(1) / (2**0.5 * 4)], dim=-1)
    torch.testing.assert_close(published @ unpacked(features(k), 16).T, features(q) @ features(k).T)


def test_every_form_is_the_quadratic_one():
    given = call(batch=2, time=300, fresh=True)
    q, k, v = (given[name].transpose(1, 2) for name in "qkv")
    u = q @ k.mT / q.shape[-1] ** 0.5
    weights = (1 + u + u**2 / 2).tril()
    want = (weights @ v / weights.sum(-1, keepdim=True)).transpose(1, 2)
    for backend in ("chunked", "reference"):
        torch.testing.assert_close(taylor_attention(**given, backend=backend)[0], want, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("cuts", [(1,), (128,), (3, 127, 129, 256)], ids=str)
def test_a_cut_anywhere_with_the_state_carried_is_no_cut(cuts):
    given = call(time=300)
    whole, after = taylor_attention(**given)
    state, outputs = given["state"], []
    for begin, end in zip((0, *cuts), (*cuts, 300)):
        y, state = taylor_attention(**{n: given[n][:, begin:end] for n in "qkv"}, state=state)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, dim=1), whole, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(state, after, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("backend", OP.backends)
def test_the_first_output_is_the_first_value(backend):
    given = {n: x.float() for n, x in call(time=1, fresh=True).items() if x is not None}
    if OP.backends[backend].why_not(**given):
        pytest.skip("this backend does not run here")
    y, _ = taylor_attention(**given, backend=backend)
    torch.testing.assert_close(y, given["v"])


def test_equal_keys_give_the_running_mean_of_the_values():
    given = call(time=40, fresh=True)
    given["k"] = given["k"][:, :1].expand_as(given["k"])
    mean = given["v"].cumsum(1) / torch.arange(1, 41)[:, None, None]
    torch.testing.assert_close(taylor_attention(**given)[0], mean)


def test_long_calls_give_the_gradients_of_short_ones():
    given = call(time=260, fresh=True)
    for name in "qkv":
        given[name].requires_grad_()
    whole, _ = taylor_attention(**given, backend="chunked")
    pieces, state = [], given["state"]
    for piece in zip(*(given[name].split(50, dim=1) for name in "qkv")):
        y, state = taylor_attention(**dict(zip("qkv", piece)), state=state, backend="chunked")
        pieces.append(y)
    got = torch.autograd.grad(whole.sin().sum(), [given[n] for n in "qkv"])
    want = torch.autograd.grad(torch.cat(pieces, 1).sin().sum(), [given[n] for n in "qkv"])
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_sums_of_a_bfloat16_model_go_on_growing():
    ones = torch.ones(1, 1000, 1, 16, dtype=torch.bfloat16)
    state, counts = None, []
    for _ in range(5):
        _, state = taylor_attention(q=ones, k=ones, v=ones, state=state)
        counts.append(float(state[0, 0, -1, 0]))
    assert state.dtype == torch.float32
    assert counts == [1000, 2000, 3000, 4000, 5000]


@pytest.mark.skipif(isinstance(native_module(), str), reason=str(native_module()))
def test_the_compiled_step_is_one_operator_to_torch():
    given = arguments_of("taylor_attention", Case(time=1), torch.float32)
    given = [given[name].requires_grad_() for name in ("q", "k", "v", "state")]
    torch.library.opcheck(torch.ops.rookery.taylor_attention_step.default, (*given, ""))


def test_the_fused_step_takes_one_token_a_row():
    ones = torch.ones(1, 3, 1, 4)
    with pytest.raises(BackendUnavailable, match="it takes one token a row, these rows have 3"):
        taylor_attention(q=ones, k=ones, v=ones, backend="native")
    with pytest.raises(BackendUnavailable, match="it takes one token a row, not packed documents"):
        taylor_attention(q=ones, k=ones, v=ones, cu_seqlens=torch.tensor([0, 3]), backend="native")


def test_a_state_of_another_shape_is_refused():
    ones = torch.ones(2, 3, 1, 4)
    with pytest.raises(ValueError, match=r"state is \[2, 1, 4, 15\], expected .*= \[2, 1, 5, 15\]"):
        taylor_attention(q=ones, k=ones, v=ones, state=torch.ones(2, 1, 4, 15))
