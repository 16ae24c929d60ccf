"""A base of 8 or 4 bits under adapters: what it computes, what it holds, what is written at the end."""

import copy

import pytest
import torch
from support.language import randomised
from torch import nn

from rookery.adapt.config import ADAPTERS, AdaptConfig
from rookery.adapt.peft import adapted_layers, adapter_tensors, attach, merge
from rookery.adapt.quantised import QuantisedLinear, held_bytes, quantise_base, restore_base
from rookery.models import load
from rookery.train.config import FinetuneConfig, overlay
from rookery.train.loop import train

pytest.importorskip("peft")
BITS = pytest.mark.parametrize("bits", ["int8", "int4"])
TOKENS = torch.tensor([[1, 5, 9, 2, 7]])


@BITS
@pytest.mark.parametrize("inputs", [64, 40, 100])
def test_a_layer_rounds_each_group_by_its_largest_number(bits, inputs):
    layer = nn.Linear(inputs, 24, bias=True)
    made = QuantisedLinear(layer, bits)
    size, steps = (64, 127) if bits == "int8" else (32, 7)
    for group in range(0, inputs, size):
        old, new = (x[:, group : group + size] for x in (layer.weight, made.weight))
        step = old.abs().amax(1, keepdim=True) / steps
        assert ((old - new).abs() <= step / 2 * 1.001).all()
        torch.testing.assert_close(new.abs().amax(1), old.abs().amax(1))  # the largest number is exact
    x = torch.randn(3, inputs, requires_grad=True)
    plain = made.as_float()
    assert torch.equal(made(x), plain(x))
    (one,) = torch.autograd.grad(made(x).square().sum(), [x])
    (other,) = torch.autograd.grad(plain(x).square().sum(), [x])
    torch.testing.assert_close(one, other)
    assert torch.equal(made.to(torch.bfloat16).weight, plain.weight.to(torch.bfloat16))  # scales are not rounded again


@BITS
def test_the_base_takes_a_quarter_or_an_eighth(bits):
    made = QuantisedLinear(layer := nn.Linear(512, 512, bias=False), bits)
    share = held_bytes(made) / held_bytes(layer)
    assert share == pytest.approx({"int8": 1 / 4 + 1 / 64, "int4": 1 / 8 + 1 / 32}[bits])


@BITS
@pytest.mark.parametrize("method", ADAPTERS)
def test_every_adapter_learns_on_it_and_merges_into_what_it_learned_on(method, bits):
    model = randomised("rwkv7-test", dtype=torch.float32)
    attach(model, AdaptConfig(method=method, rank=4), seed=1)
    quantise_base(model, bits)
    with torch.no_grad():
        for tensor in adapter_tensors(model).values():
            tensor.add_(0.05 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(2)))
    rounded = copy.deepcopy(model)
    model(TOKENS)[0].sum().backward()
    assert all(t.grad is not None for t in adapter_tensors(model).values())
    expected = rounded(TOKENS)[0]
    assert all(isinstance(m.get_base_layer(), QuantisedLinear) for m in adapted_layers(rounded).values())
    restore_base(rounded)
    merge(rounded)
    torch.testing.assert_close(rounded(TOKENS)[0], expected, rtol=1e-4, atol=1e-4)
    assert list(rounded.state_dict()) == list(randomised("rwkv7-test").state_dict())


@pytest.mark.parametrize("method", ["lora", "pissa"])
def test_a_run_on_a_rounded_base_goes_on_exactly_and_writes_what_it_learned(tmp_path, method):
    (tmp_path / "t.txt").write_text("One day a bird sang. " * 30)
    values = {
        "base": "embedded",
        "adapt": {"method": method, "rank": 4, "base": "int4"},
        "data": {"path": str(tmp_path / "t.txt"), "sequence_length": 32, "validation_share": 0.0},
        "optim": {"lr": 1e-3, "eps": 1e-8},
        "out": str(tmp_path / "whole"),
        "merge": True,
        "steps": 4,
        "batch_size": 1,
        "save_every": 2,
        "validate_every": 0,
        "threads": 1,
    }
    config = overlay(FinetuneConfig(), values)
    train(config)
    train(overlay(config, {"out": str(tmp_path / "cut")}))
    for name in ("checkpoints/step-00000004.pt", "model.safetensors"):
        (tmp_path / "cut" / name).unlink()
    train(overlay(config, {"out": str(tmp_path / "cut")}))
    one, other = (load(tmp_path / name / "model.safetensors").state_dict() for name in ("whole", "cut"))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"base": "int2"}, "adapt.base must be int8, int4 or empty"),
        ({"method": "full", "base": "int8"}, "adapt.base rounds what does not learn"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        AdaptConfig(**settings)
