"""Groups, schedule and master weights."""

import math

import pytest
import torch

from rookery.models import create_model
from rookery.train.config import OptimConfig
from rookery.train.optim import Optimizer, learning_rate, parameter_groups


def names_by_group(model):
    name_of = {id(p): name for name, p in model.named_parameters()}
    return {g["name"]: {name_of[id(p)] for p in g["params"]} for g in parameter_groups(model, 0.1)}


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
