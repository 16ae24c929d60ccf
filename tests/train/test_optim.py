"""Groups, schedule and master weights."""

import copy
import math
import sys

import pytest
import torch

from rookery.errors import MissingDependency
from rookery.models import create_model
from rookery.train.config import OptimConfig
from rookery.train.optim import Optimizer, learning_rate, parameter_groups


def names_by_group(model, layerwise=False):
    name_of = {id(p): name for name, p in model.named_parameters()}
    return {g["name"]: {name_of[id(p)] for p in g["params"]} for g in parameter_groups(model, 0.1, layerwise)}


def test_rates_by_layer_are_those_of_rwkv_lm():
    four, six = (create_model(name) for name in ("rwkv4-test", "rwkv6-test"))
    groups = names_by_group(four, layerwise=True)
    assert {name.split(".")[-1] for name in groups["fast"]} == {"time_decay"}
    assert {name.split(".")[-1] for name in groups["first"]} == {"time_first"}
    assert {name.split(".")[-1] for name in names_by_group(six, layerwise=True)["fast"]} == {"time_decay"}
    rates = {g["name"]: g["lr_scale"] for g in parameter_groups(four, 0.1, layerwise=True)}
    assert rates == {"decayed": 1.0, "fast": 2.0, "first": 3.0, "plain": 1.0}
    assert "fast" not in names_by_group(four)


def test_groups_are_the_official_ones():
    model = create_model("rwkv7-test")
    groups = names_by_group(model)
    matrices = {"receptance", "key", "value", "output"}
    decayed = {n for n, _ in model.named_parameters() if n.split(".")[-2] in matrices} | {"emb.weight", "head.weight"}
    assert groups["decayed"] == decayed
    assert groups["fast"] == {f"blocks.{i}.att.w0" for i in range(3)}
    assert set.union(*groups.values()) == {n for n, _ in model.named_parameters()}
    assert sum(map(len, groups.values())) == len(list(model.parameters()))


def test_group_settings_are_the_official_ones():
    settings = {
        g["name"]: (g["weight_decay"], g["lr_scale"]) for g in parameter_groups(create_model("rwkv7-test"), 0.1)
    }
    assert settings == {"decayed": (0.1, 1.0), "fast": (0.0, 2.0), "plain": (0.0, 1.0)}


def test_cosine_goes_from_the_peak_to_the_end():
    config = OptimConfig(lr=1.0, final_lr=0.1, warmup_steps=10)
    assert learning_rate(config, 5, 110) == pytest.approx(0.01 + 0.99 * 0.5)
    assert learning_rate(config, 10, 110) == pytest.approx(1.0)
    assert learning_rate(config, 60, 110) == pytest.approx(0.55)
    assert learning_rate(config, 110, 110) == pytest.approx(0.1)


def test_wsd_is_flat_then_falls_in_a_line():
    config = OptimConfig(lr=1.0, final_lr=0.0, schedule="wsd", warmup_steps=2, decay_share=0.5)
    rates = [learning_rate(config, step, 100) for step in (2, 50, 75, 100)]
    assert rates == pytest.approx([1.0, 1.0, 0.5, 0.0])


def test_the_stable_part_of_wsd_does_not_depend_on_the_length_of_the_run():
    config = OptimConfig(schedule="wsd", decay_share=0.2)
    assert [learning_rate(config, s, 100) for s in range(1, 80)] == [
        learning_rate(config, s, 400) for s in range(1, 80)
    ]


def test_updates_smaller_than_bfloat16_resolves_add_up_in_the_masters():
    model = torch.nn.Linear(4, 4, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
    optimizer = Optimizer(model, OptimConfig(weight_decay=0.0, clip=1e9), torch.bfloat16)
    for _ in range(100):
        model.weight.grad = torch.ones_like(model.weight)
        optimizer.step(1e-4)
    assert model.weight.dtype == torch.bfloat16
    # a bfloat16 weight near 1 cannot take a step of 1e-4 by itself
    torch.testing.assert_close(model.weight.float(), torch.full((4, 4), 0.99), atol=4e-3, rtol=0)


def test_the_norm_is_reported_before_clipping_and_the_update_is_clipped():
    weights = []
    for clip in (1.0, math.inf):
        model = torch.nn.Linear(2, 2, bias=False)
        torch.nn.init.zeros_(model.weight)
        optimizer = Optimizer(model, OptimConfig(clip=clip, eps=1.0), torch.float32)
        model.weight.grad = torch.full((2, 2), 100.0)
        assert optimizer.step(1.0) == pytest.approx(200.0)
        weights.append(model.weight.abs().max().item())
    assert weights[0] < weights[1] / 2


def test_linear_and_exponential_go_from_the_peak_to_the_end():
    config = OptimConfig(lr=1.0, final_lr=0.01, schedule="linear", warmup_steps=10)
    assert [learning_rate(config, s, 110) for s in (10, 60, 110)] == pytest.approx([1.0, 0.505, 0.01])
    config = OptimConfig(lr=1.0, final_lr=0.01, schedule="exponential", warmup_steps=10)
    assert [learning_rate(config, s, 110) for s in (10, 60, 110)] == pytest.approx([1.0, 0.1, 0.01])


def test_an_exponential_schedule_to_zero_is_refused():
    with pytest.raises(ValueError, match="above 0"):
        OptimConfig(schedule="exponential", final_lr=0.0)


def test_an_unknown_optimiser_is_refused():
    with pytest.raises(ValueError, match="name must be one of adamw, muon"):
        OptimConfig(name="adam")


def test_muon_moves_the_matrices_of_the_blocks_and_adamw_the_rest():
    model = create_model("rwkv7-test")
    name_of = {id(p): name for name, p in model.named_parameters()}
    optimizer = Optimizer(model, OptimConfig(name="muon"), torch.float32)
    adam, muon = ({name_of[id(p)] for g in o.param_groups for p in g["params"]} for o in optimizer.inner)
    assert muon == {n for n in name_of.values() if n.split(".")[-2] in ("receptance", "key", "value", "output")}
    assert adam == set(name_of.values()) - muon


def moved_by(config, steps=3):
    torch.manual_seed(0)
    model = create_model("rwkv7-test")
    optimizer = Optimizer(model, config, torch.float32)
    for _ in range(steps):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step(1e-2)
    return model, optimizer


@pytest.mark.parametrize("name", ["adamw", "muon", "schedule-free"])
def test_an_optimiser_continues_from_its_state(name):
    if name == "schedule-free":
        pytest.importorskip("schedulefree")
    config = OptimConfig(name=name, lr=1e-2)
    (one, first), (other, second) = moved_by(config), moved_by(config, steps=1)
    second.fill()
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for model, optimizer in ((one, first), (other, second)):
        torch.manual_seed(1)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step(1e-2)
    for (name, a), b in zip(one.named_parameters(), other.parameters()):
        assert torch.equal(a, b), name


def test_schedule_free_keeps_averaged_weights():
    pytest.importorskip("schedulefree")
    model, optimizer = moved_by(OptimConfig(name="schedule-free"))
    learning = model.head.weight.detach().clone()
    with optimizer.averaged():
        assert not torch.equal(model.head.weight, learning)
    torch.testing.assert_close(model.head.weight, learning, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("name", "module"), [("adamw-8bit", "torchao.optim"), ("schedule-free", "schedulefree")])
def test_a_missing_optimiser_names_what_to_install(monkeypatch, name, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingDependency, match=r"rookery\[train\]"):
        Optimizer(torch.nn.Linear(2, 2), OptimConfig(name=name, eps=1e-8), torch.float32)


def test_a_gradient_that_is_not_finite_moves_nothing():
    model = torch.nn.Linear(2, 2)
    before = model.weight.detach().clone()
    optimizer = Optimizer(model, OptimConfig(), torch.float32)
    for p in model.parameters():
        p.grad = torch.full_like(p, math.nan)
    assert math.isnan(optimizer.step(1.0))
    assert torch.equal(model.weight, before)
    assert model.weight.grad is None


def test_eight_bits_with_the_official_epsilon_are_refused():
    with pytest.raises(ValueError, match=r"adamw-8bit needs optim\.eps of at least 1e-8, got 1e-18"):
        OptimConfig(name="adamw-8bit")
