"""Halving the residual stream of deep models (rescale): it is true that …"""

import pytest
import torch
from support.equations import rms_error
from support.language import assert_close, randomise, randomised, some_tokens

import rookery
from rookery.errors import BadState
from rookery.models import create_model, save_model
from rookery.nn.rwkv import rescale

FAMILIES = ("rwkv4", "rwkv5", "rwkv6")
LAYERS = 14


def deep(family, dtype=torch.float64, scale=1.0, **settings):
    """A model of 14 layers whose blocks add numbers of this scale to the residual stream."""
    model = randomise(create_model(f"{family}-test", dtype=torch.float64, num_hidden_layers=LAYERS, **settings))
    with torch.no_grad():
        for block in model.blocks:
            block.att.output.weight.mul_(scale)
            block.ffn.value.weight.mul_(scale)
    return model.to(dtype)


@torch.no_grad()
@pytest.mark.parametrize("every", [1, 5, 6, 20])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_stay_what_they_were(family, every):
    # layer norms do not see a factor but for their epsilon
    model = deep(family, layer_norm_eps=1e-20)
    tokens = some_tokens(model, 2, 30)
    want, state = model(tokens)
    rescale(model, every)
    assert model.config.rescale_every == every
    got, rescaled = model(tokens)
    assert_close(got, want, "logits")
    for i, (a, b) in enumerate(zip(rescaled.layers, state.layers)):
        assert_close(a.wkv, b.wkv, f"layer {i} wkv")
    first, half = model(tokens[:, :11])
    assert_close(torch.cat([first, model(tokens[:, 11:], half)[0]], dim=1), want, "logits of two pieces")


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_what_each_block_adds_is_divided_by_two_to_the_number_of_halvings_before_it(family):
    model = deep(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rescale(model)
    for name, value in model.state_dict().items():
        layer = int(name.split(".")[1]) if name.startswith("blocks.") else 0
        scaled = name.endswith(("att.output.weight", "ffn.value.weight"))
        assert torch.equal(value, before[name] / 2 ** (layer // 6 if scaled else 0)), name
    rescale(model, 4)
    rescale(model, 0)
    assert model.config.rescale_every == 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_float16_runs_of_a_deep_model_stay_finite(family):
    scale = {"rwkv4": 3e3, "rwkv5": 6e3, "rwkv6": 6e3}[family]
    exact, plain, rescaled = deep(family), *(deep(family, torch.float16, scale) for _ in range(2))
    exact.load_state_dict(plain.state_dict())
    tokens = some_tokens(exact, 1, 30)
    assert not plain(tokens)[0].isfinite().all(), "without it the stream leaves float16"
    rescale(rescaled, 2)
    logits, _ = rescaled(tokens)
    assert logits.isfinite().all()
    assert rms_error(logits, exact(tokens)[0]) < 0.02


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_keeps_weights_and_setting_together(family, tmp_path):
    model = deep(family, torch.float32)
    tokens = some_tokens(model, 1, 9)
    state = model(tokens)[1]
    rescale(model)
    save_model(model, tmp_path / "m.safetensors")
    back = rookery.load(tmp_path / "m.safetensors")
    assert back.config.rescale_every == 6
    assert torch.equal(back(tokens)[0], model(tokens)[0])
    with pytest.raises(BadState, match="rescale_every 0 against 6"):
        model(tokens, state)


def test_families_that_do_not_offer_it_say_so():
    with pytest.raises(ValueError, match="rwkv7 has no rescale_every; RWKV-4, 5 and 6 have"):
        rescale(randomised("rwkv7-test"))
