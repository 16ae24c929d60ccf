"""Identities of the linear recurrences (state_methods.md 0.3): it is true that …"""

import pytest
import torch
from support.language import randomised, some_tokens

from rookery.adapt.kernel_state import KernelStart
from rookery.adapt.read_features import features_of, read_features, recorded
from rookery.adapt.state_tuning import StartState
from rookery.models import create_model

PRECISION = 1e-12
"""Float64; what is found is about 1e-14."""


def starts_of(name):
    model = randomised(name).requires_grad_(False).eval()
    starts = [StartState(model), KernelStart(model, features=40), KernelStart(model, features=24, transition="none")]
    for start in starts[1:]:
        start.calibrate(some_tokens(model, 2, 40))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for start in starts:
            for wkv in start.wkv:
                wkv.copy_(torch.randn(wkv.shape, generator=generator, dtype=torch.float64))
    return starts


@torch.no_grad()
@pytest.mark.parametrize("name", ["rwkv5-test", "rwkv6-test", "rwkv7-test"])
def test_a_start_state_adds_a_linear_term_whose_inputs_are_the_read_features(name):
    for start in starts_of(name):
        model = start.model[0]
        with recorded(model) as kept:
            model(some_tokens(model, 2, 23), start(2))
        for layer, one in enumerate(kept):
            zero, _ = one.run(**{**one.call, "state": torch.zeros_like(one.call["state"])})
            linear = torch.einsum("hvm,bthm->bthv", start.value(layer), features_of(one))
            torch.testing.assert_close(one.y, zero + linear, rtol=PRECISION, atol=PRECISION * float(one.y.abs().max()))


@pytest.mark.parametrize("name", ["rwkv5-test", "rwkv6-test", "rwkv7-test"])
def test_the_gradient_of_a_start_state_is_a_sum_of_products_with_its_features(name):
    for start in starts_of(name):
        model = start.model[0]
        with recorded(model) as kept:
            logits, _ = model(some_tokens(model, 2, 23), start(2))
        last = len(kept) - 1  # of the last layer: what is above an earlier one depends on it in other ways, too
        loss = logits.square().sum()
        wanted, g = torch.autograd.grad(loss, [start.wkv[last], kept[last].y])
        product = torch.einsum("bthv,bthm->hvm", g, features_of(kept[last]))
        torch.testing.assert_close(product, wanted, rtol=PRECISION, atol=PRECISION * float(wanted.abs().max()))


def test_features_come_from_the_positions_that_count():
    start = starts_of("rwkv7-test")[0]
    tokens = some_tokens(start.model[0], 3, 10)
    mask = torch.zeros(3, 10, dtype=torch.bool)
    mask[:, 7] = True
    everywhere, here = read_features(start, tokens, positions=None), read_features(start, tokens, mask=mask)
    for all_of_them, some in zip(everywhere, here):
        assert some.shape[0] == 3
        found = torch.cdist(some.flatten(1), all_of_them.unflatten(0, (3, 10))[:, 7].flatten(1)) < 1e-12
        assert found.any(0).all()
    assert [len(x) for x in read_features(start, tokens, positions=8)] == [8, 8, 8]


def test_looking_leaves_no_trace():
    start = starts_of("rwkv7-test")[0]
    read_features(start, some_tokens(start.model[0], 1, 5))
    assert all("recurrence" not in vars(block.att) for block in start.model[0].blocks)


def test_other_models_are_refused():
    model = create_model("transformer-test")
    with pytest.raises(ValueError, match="the recurrence of a transformer model cannot be looked at"), recorded(model):
        pass
