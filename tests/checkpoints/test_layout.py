import math
import re

import numpy as np
import pytest
from support.files import ggmf_weights, tiny

from rookery.checkpoints.layout import STEPS, from_foreign, to_foreign
from rookery.checkpoints.source import in_memory
from rookery.families.layout import Layout, Rule
from rookery.families.rwkv7 import FAMILY
from rookery.registry import families
from rookery.state import to_numpy

PAIRS = [(family.name, name) for family in families().values() for name in family.layouts]


def stored(model):
    return {name: in_memory(to_numpy(weight)) for name, weight in model.state_dict().items()}


def _moves_only(layout, name):
    template = re.sub(r"\.\d+\.", ".{layer}.", name, count=1)
    return all(STEPS[step].moves for rule in layout.rules if template in rule.official for step in rule.steps)


@pytest.mark.parametrize(("family", "layout"), PAIRS)
def test_a_model_comes_back_from_every_layout(family, layout):
    model = tiny(f"{family}-test")
    layout, official = families()[family].layouts[layout], stored(model)
    foreign = to_foreign(layout, official)
    back = from_foreign(layout, foreign)
    assert sorted(back) == sorted(official)
    for name, tensor in official.items():
        want = tensor.read()
        got = back[name].read()
        assert got.shape == back[name].shape
        # tensors that only move come back exactly, exponentials to float32's digits
        tolerance = 0 if _moves_only(layout, name) else 1e-5
        np.testing.assert_allclose(got.reshape(want.shape), want, rtol=tolerance, err_msg=name)
    for name, tensor in foreign.items():
        assert tensor.read().shape == tensor.shape, name


def test_ggmf_names_and_shapes_are_those_of_rwkv_cpp():
    model = tiny()
    foreign = to_foreign(FAMILY.layouts["ggmf"], stored(model))
    want = ggmf_weights(model)
    assert sorted(foreign) == sorted(want)
    for name, array in want.items():
        np.testing.assert_array_equal(foreign[name].read(), array, err_msg=name)


def test_fla_names_and_shapes_are_those_of_its_models():
    model = tiny()
    config = model.config
    width, layers = config.hidden_size, config.num_hidden_layers
    official, foreign = stored(model), to_foreign(FAMILY.layouts["fla"], stored(model))
    assert {name.split(".")[0] for name in foreign} == {"model", "lm_head"}
    assert foreign["model.layers.1.attn.v_lora.lora.0.weight"].shape == (config.value_rank, width)
    assert foreign["model.layers.1.attn.w_lora.lora.2.weight"].shape == (width, config.decay_rank)
    assert foreign["model.layers.2.attn.a_lora.lora.2.bias"].shape == (width,)
    assert foreign["model.layers.0.attn.x_r"].shape == (1, 1, width)
    assert foreign["model.layers.0.ffn.x_k"].shape == foreign["model.layers.0.attn.k_k"].shape == (width,)
    assert foreign["model.layers.0.attn.r_k"].shape == (config.num_heads, config.head_dim)
    assert "model.layers.0.pre_norm.bias" in foreign
    assert "model.layers.1.pre_norm.bias" not in foreign
    assert "model.layers.0.attn.v_lora.lora.2.bias" not in foreign
    assert sum(name.endswith("attn.o_proj.weight") for name in foreign) == layers
    for theirs, ours in (("r", "receptance"), ("k", "key"), ("v", "value"), ("o", "output")):
        got = foreign[f"model.layers.1.attn.{theirs}_proj.weight"].read()
        np.testing.assert_array_equal(got, official[f"blocks.1.att.{ours}.weight"].read())


def test_the_mixes_of_the_first_fla_versions_are_read():
    official = stored(tiny())
    foreign = to_foreign(FAMILY.layouts["fla"], official)
    for layer in range(3):
        mixes = [foreign.pop(f"model.layers.{layer}.attn.x_{name}").read().reshape(-1) for name in "rwkvag"]
        foreign[f"model.layers.{layer}.attn.x_x"] = in_memory(np.stack(mixes))
    back = from_foreign(FAMILY.layouts["fla"], foreign)
    assert sorted(back) == sorted(official)
    for name in "rwkvag":
        got = back[f"blocks.2.att.x_{name}"].read()
        np.testing.assert_array_equal(got.reshape(1, 1, -1), official[f"blocks.2.att.x_{name}"].read())


@pytest.mark.parametrize("name", STEPS)
def test_every_step_has_its_inverse_and_shape(name):
    shape = {"join_five": (5, 4, 6), "r_first": (10, 1, 6), "w_first": (10, 1, 6)}.get(name, (4, 1, 6))
    array = np.linspace(-3, 1, math.prod(shape)).reshape(shape)
    layout = Layout(rules=(Rule("f.{layer}.x", "o.{layer}.x", (name,)),))
    foreign = to_foreign(layout, {"o.17.x": in_memory(array)})
    assert list(foreign) == ["f.17.x"]
    assert foreign["f.17.x"].shape == foreign["f.17.x"].read().shape
    back = from_foreign(layout, foreign)["o.17.x"]
    assert back.shape == back.read().shape
    np.testing.assert_allclose(back.read().reshape(array.shape), array, rtol=1e-12)


def test_decays_survive_float32_exponentials():
    decay = np.linspace(-8, 1, 100, dtype=np.float32)  # the range of trained RWKV-5 decays
    layout = Layout(rules=(Rule("x", "x", ("exp_negative_exp", "column")),))
    foreign = to_foreign(layout, {"x": in_memory(decay)})["x"]
    np.testing.assert_allclose(foreign.read()[:, 0], np.exp(-np.exp(decay.astype(np.float64))), rtol=1e-6)
    back = from_foreign(layout, {"x": in_memory(foreign.read())})["x"].read()
    assert back.dtype == np.float32
    # exp(-exp(-8)) is within 3e-4 of 1, where float32 has four digits left
    np.testing.assert_allclose(back, decay, atol=1e-3)


def test_nothing_is_read_before_it_is_asked_for():
    official = stored(tiny())
    for tensor in official.values():
        object.__setattr__(tensor, "read", None)
    for layout in FAMILY.layouts.values():
        assert from_foreign(layout, to_foreign(layout, official)).keys() == official.keys()
