"""Tuned states: the published files start every way to run a model from the same state, and no other model."""

import json

import numpy as np
import pytest
import torch
from support.language import randomised

from rookery.checkpoints import open_checkpoint
from rookery.checkpoints.describe import inspect
from rookery.checkpoints.safetensors import read_safetensors, write_safetensors
from rookery.checkpoints.tuned_state import find_tuned_state, read_tuned_state, save_tuned_state
from rookery.engine.llm import LLM
from rookery.engine.runners.torch import TorchRunner
from rookery.errors import BadCheckpoint, BadState
from rookery.models import load, save_model
from rookery.state import State

TOKENS = [3, 1, 4, 1, 5]


def matrices(config, seed=5):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=config.wkv_shape).astype(np.float32) for _ in range(config.num_hidden_layers)]


def named(states):
    return {f"blocks.{i}.att.time_state": state for i, state in enumerate(states)}


def started(model, states):
    """The state that `states` mean, put together by hand."""
    fresh = model.init_state(1)
    wkv = {f"layers.{i}.wkv": torch.tensor(s)[None] for i, s in enumerate(states)}
    return fresh.with_tensors(fresh.tensors() | wkv, fresh.tokens_seen)


@pytest.fixture(scope="module")
def model():
    return randomised("rwkv7-test", dtype=torch.float32)


def write(path, states, model=None):
    if path.name.startswith("own"):
        save_tuned_state(path, named(states), model.config)
    elif path.suffix == ".pth":
        torch.save({name: torch.tensor(state) for name, state in named(states).items()}, path)
    elif path.suffix == ".st":
        write_safetensors(path, {name: state.swapaxes(1, 2) for name, state in named(states).items()}, {})
    else:
        write_safetensors(path, named(states), {})
    return path


@pytest.mark.parametrize("file", ["state.pth", "state.st", "state.safetensors", "own.pth", "own.st", "own.safetensors"])
@pytest.mark.parametrize("name", ["rwkv5-test", "rwkv6-test", "rwkv7-test", "rwkv7b-test"])
def test_every_published_layout_starts_the_model(tmp_path, name, file):
    model = randomised(name, dtype=torch.float32)
    states = [np.float16(state).astype(np.float32) for state in matrices(model.config)]
    path = write(tmp_path / file, states, model)
    expected = model(torch.tensor([TOKENS]), started(model, states))[0]
    state = State.load(path, model)
    torch.testing.assert_close(model(torch.tensor([TOKENS]), state)[0], expected, rtol=0, atol=0)
    assert state.tokens_seen.tolist() == [0]
    rows = model(torch.tensor([TOKENS] * 3), state.select([0, 0, 0]))[0]
    torch.testing.assert_close(rows, expected.expand(3, -1, -1), rtol=1e-4, atol=1e-4)
    session = LLM.from_runner(TorchRunner(model)).session(path)
    session.feed(TOKENS)
    assert session.tokens_seen == len(TOKENS)
    np.testing.assert_allclose(session._at.logits, expected[0, -1].detach(), rtol=1e-5, atol=1e-5)


def test_matrices_are_value_by_key_but_in_st_files(tmp_path, model):
    """v6 code reads r · S with S [key, value] after transposing what files hold; ours is [value, key] as they are."""
    states = matrices(model.config)
    assert not np.allclose(states[0], states[0].swapaxes(1, 2))
    for file in ("a.pth", "a.st", "a.safetensors"):
        found = read_tuned_state(write(tmp_path / file, states))
        np.testing.assert_array_equal(found.tensors["layers.0.wkv"], states[0])
    turned = read_tuned_state(tmp_path / "a.pth", order="key_value")
    np.testing.assert_array_equal(turned.tensors["layers.0.wkv"], states[0].swapaxes(1, 2))


def test_the_runtimes_agree_on_a_tuned_state(tmp_path, model):
    save_model(model, tmp_path / "model.safetensors")
    path = write(tmp_path / "state.pth", matrices(model.config))
    native, by_torch = (LLM(tmp_path / "model.safetensors", device=device) for device in (None, "cpu"))
    assert (native.runner.name, by_torch.runner.name) == ("native", "torch")
    logits = []
    for llm in (native, by_torch):
        session = llm.session(path)
        session.feed(TOKENS)
        logits.append(session._at.logits)
    np.testing.assert_allclose(logits[0], logits[1], rtol=1e-4, atol=1e-4)
    zero = by_torch.session()
    zero.feed(TOKENS)
    assert np.abs(zero._at.logits - logits[1]).max() > 0.01


def test_rwkv4_starts_from_its_two_sums(tmp_path):
    model = randomised("rwkv4-test", dtype=torch.float32)
    width, layers = model.config.hidden_size, model.config.num_hidden_layers
    sums = [state[:2] for state in matrices(model.config)]
    torch.save({name: torch.tensor(state) for name, state in named(sums).items()}, tmp_path / "v4.pth")
    state = State.load(tmp_path / "v4.pth", model)
    want = np.stack([sums[0][0], sums[0][1].clip(min=0), np.zeros(width)])
    np.testing.assert_array_equal(state.layers[0].wkv[0], want)
    save_tuned_state(tmp_path / "own", {f"layers.{i}.wkv": state.layers[i].wkv for i in range(layers)}, model.config)
    np.testing.assert_array_equal(State.load(tmp_path / "own", model).layers[1].wkv, state.layers[1].wkv)


def test_shift_vectors_may_be_tuned_too(tmp_path, model):
    width = model.config.hidden_size
    rows = np.arange(2 * width, dtype=np.float32).reshape(2, width)
    tensors = named(matrices(model.config)) | {"blocks.0.att.ts_state": rows, "blocks.1.att.ts_state": rows[1]}
    write_safetensors(tmp_path / "s.safetensors", tensors, {})
    state = State.load(tmp_path / "s.safetensors", model)
    np.testing.assert_array_equal(state.layers[0].att_shift[0], rows[0])
    np.testing.assert_array_equal(state.layers[0].ffn_shift[0], rows[1])
    np.testing.assert_array_equal(state.layers[1].att_shift[0], rows[1])
    assert not state.layers[1].ffn_shift.any()
    save_tuned_state(tmp_path / "again.pth", state, model.config)
    again = State.load(tmp_path / "again.pth", model)
    for name, tensor in state.tensors().items():
        assert torch.equal(again.tensors()[name], tensor), name


def test_a_model_that_carries_a_state_starts_from_it(tmp_path, model):
    states = matrices(model.config)
    weights = model.state_dict() | {name: torch.tensor(state) for name, state in named(states).items()}
    torch.save(weights, tmp_path / "merged.pth")
    expected = model(torch.tensor([TOKENS]), started(model, states))[0][0].detach()
    for device in (None, "cpu"):
        np.testing.assert_allclose(LLM(tmp_path / "merged.pth", device=device).logits(TOKENS), expected, atol=1e-4)
    again = load(tmp_path / "merged.pth")
    state = State.load(tmp_path / "merged.pth", again)
    torch.testing.assert_close(again(torch.tensor([TOKENS]), state)[0][0], expected, rtol=1e-5, atol=1e-5)
    assert set(open_checkpoint(tmp_path / "merged.pth").unused) == set(named(states))
    summary = inspect(tmp_path / "merged.pth")
    assert (summary["tuned_state"], summary["unused"]) == (True, [])


def test_a_conversion_keeps_the_state_or_names_it(tmp_path, model):
    from rookery.checkpoints.convert import convert

    states = named(matrices(model.config))
    torch.save(model.state_dict() | {name: torch.tensor(s) for name, s in states.items()}, tmp_path / "merged.pth")
    assert convert(tmp_path / "merged.pth", tmp_path / "kept.safetensors").left_out == ()
    np.testing.assert_array_equal(
        read_safetensors(tmp_path / "kept.safetensors").tensors["blocks.1.att.time_state"].read(),
        states["blocks.1.att.time_state"],
    )
    assert set(convert(tmp_path / "merged.pth", tmp_path / "lost.gguf").left_out) == set(states)


def test_the_file_is_small_and_says_what_it_is_for(tmp_path, model):
    save_tuned_state(tmp_path / "t.safetensors", started(model, matrices(model.config)), model.config, model="print")
    source = read_safetensors(tmp_path / "t.safetensors")
    assert sorted(source.tensors) == sorted(named(range(model.config.num_hidden_layers)))
    assert source.metadata["family"] == "rwkv7"
    assert json.loads(source.metadata["config"])["hidden_size"] == model.config.hidden_size
    with pytest.raises(BadState, match="it was trained for the weights print, these are"):
        State.load(tmp_path / "t.safetensors", model)
    with pytest.raises(BadCheckpoint, match="this is a tuned state"):
        open_checkpoint(tmp_path / "t.safetensors")


def test_the_state_of_another_model_is_refused(tmp_path, model):
    path = write(tmp_path / "state.pth", matrices(model.config))
    longer = randomised("rwkv7-test", dtype=torch.float32, num_hidden_layers=4)
    with pytest.raises(BadState, match=r"tuned state of another model: it has 3 layers, this model's state has 4; use"):
        State.load(path, longer)
    wider = randomised("rwkv7-test", dtype=torch.float32, hidden_size=64)
    with pytest.raises(BadState, match=r"its layers.0.wkv is 2 × 16 × 16, this model's is 4 × 16 × 16; use the model"):
        State.load(path, wider)
    own = write(tmp_path / "own.safetensors", matrices(model.config), model)
    with pytest.raises(BadState, match="hidden_size 32 against 64; use the model it was trained with"):
        State.load(own, wider)
    other = randomised("rwkv6-test", dtype=torch.float32)
    with pytest.raises(BadState, match="it starts a model of family rwkv7, this one is rwkv6"):
        LLM.from_runner(TorchRunner(other)).session(own)


def test_what_is_no_tuned_state_is_refused(tmp_path, model):
    torch.save({"a": torch.ones(2)}, tmp_path / "a.pth")
    with pytest.raises(BadState, match="holds no tuned state: tensors named 'blocks.0.att.time_state' are missing"):
        read_tuned_state(tmp_path / "a.pth")
    with pytest.raises(BadState, match="holds no tuned state: tensors named 'blocks.0.att.time_state' are missing"):
        State.load(tmp_path / "a.pth", model)
    with pytest.raises(BadState, match="there is no state file"):
        State.load(tmp_path / "absent.pth", model)
    assert find_tuned_state(tmp_path / "absent") is None
    with pytest.raises(BadState, match="there is no state file"):
        State.load(tmp_path / "absent", model)
    whole = named(np.ones((2, 16, 16), np.int64) for _ in range(3))
    write_safetensors(tmp_path / "whole.safetensors", whole, {})
    with pytest.raises(BadState, match="holds int64 numbers; a state holds floats"):
        State.load(tmp_path / "whole.safetensors", model)
    marked = {"format": "rookery-tuned-state-1", "config": "["}
    write_safetensors(tmp_path / "m.safetensors", named(matrices(model.config)), marked)
    with pytest.raises(BadState, match="is damaged: the sizes in its metadata cannot be read"):
        State.load(tmp_path / "m.safetensors", model)


def test_a_state_that_does_not_fit_its_config_is_not_written(tmp_path, model):
    states = matrices(model.config)
    with pytest.raises(BadState, match="no tuned state of rwkv7 with 3 layers: see 'blocks.2.att.time_state'"):
        save_tuned_state(tmp_path / "s", named(states[:2]), model.config)
    with pytest.raises(BadState, match=r"has shape \[2, 16, 8\], this model's recurrent state has \[2, 16, 16\]"):
        save_tuned_state(tmp_path / "s", named([state[..., :8] for state in states]), model.config)
    with pytest.raises(BadState, match="a tuned state has one row, layers.0.att_shift has 2; select one"):
        save_tuned_state(tmp_path / "s", model.init_state(2), model.config)
    with pytest.raises(BadState, match="transformer has no recurrent state that could be tuned"):
        save_tuned_state(tmp_path / "s", {}, randomised("transformer-test").config)
    assert not (tmp_path / "s").exists()
