import numpy as np
import pytest
import torch
from support.language import names, randomised, some_tokens

from rookery.engine.llm import LLM
from rookery.engine.runners.torch import TorchRunner
from rookery.errors import BadState
from rookery.models import create_model
from rookery.state import State

LANGUAGE = pytest.mark.parametrize("name", names())


def model_and_tokens(name, dtype=torch.float32):
    model = randomised(name, dtype=dtype)
    return model, some_tokens(model, 1, 40)


@LANGUAGE
def test_the_logits_are_the_models(name):
    model, tokens = model_and_tokens(name)
    with torch.no_grad():
        expected = model(tokens)[0][0].numpy()
    llm = LLM.from_runner(TorchRunner(model))
    np.testing.assert_array_equal(llm.logits(tokens[0].tolist()), expected)
    assert llm.logits([]).shape == (0, model.config.vocab_size)


@LANGUAGE
@pytest.mark.parametrize("wanted", ["none", "last", "all"])
def test_only_the_logits_asked_for_come_back(name, wanted):
    model, tokens = model_and_tokens(name)
    runner, ids = TorchRunner(model), tokens[0].tolist()
    state = runner.init_state()
    logits = runner.forward(ids, state, wanted)
    rows = {"none": 0, "last": 1, "all": 40}[wanted]
    assert (logits.shape, logits.dtype) == ((rows, model.config.vocab_size), np.float32)
    assert state.tokens_seen == 40
    whole = runner.forward(ids, runner.init_state(), "all")
    np.testing.assert_allclose(logits, whole[40 - rows :], rtol=1e-5, atol=1e-6)
    assert runner.forward([], state, wanted).shape == (0, model.config.vocab_size)
    assert state.tokens_seen == 40


@LANGUAGE
def test_a_copied_state_stays_while_the_other_goes_on(name):
    model, tokens = model_and_tokens(name)
    runner, ids = TorchRunner(model), tokens[0].tolist()
    state = runner.init_state()
    runner.forward(ids[:10], state)
    kept = state.copy()
    first = runner.forward(ids[10:], state)
    assert (kept.tokens_seen, state.tokens_seen) == (10, 40)
    np.testing.assert_array_equal(runner.forward(ids[10:], kept), first)


@LANGUAGE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_goes_through_arrays_unchanged(name, dtype):
    model, tokens = model_and_tokens(name, dtype)
    runner, ids = TorchRunner(model), tokens[0].tolist()
    state = runner.init_state()
    runner.forward(ids[:10], state)
    again = runner.init_state(state.tensors())
    assert (again.tokens_seen, again.nbytes) == (10, state.nbytes)
    np.testing.assert_array_equal(runner.forward(ids[10:], again), runner.forward(ids[10:], state))


def test_arrays_of_another_model_are_refused():
    runner = TorchRunner(create_model("rwkv7-test"))
    other = TorchRunner(create_model("transformer-test"))
    with pytest.raises(BadState, match="this model's state is"):
        runner.init_state(other.init_state().tensors())


@LANGUAGE
def test_a_saved_session_goes_on_exactly(name, tmp_path):
    model, tokens = model_and_tokens(name)
    llm = LLM.from_runner(TorchRunner(model))
    session = llm.session()
    session.feed(tokens[0].tolist())
    first = list(session.stream_tokens(8, seed=1, top_p=0.9, ignore_eos=True))
    session.save(tmp_path / "s")
    second = list(session.stream_tokens(8, seed=1, top_p=0.9, ignore_eos=True))
    loaded = LLM.from_runner(TorchRunner(model)).session(tmp_path / "s")
    assert loaded.tokens_seen == 48
    assert list(loaded.stream_tokens(8, seed=1, top_p=0.9, ignore_eos=True)) == second
    assert first != second


def test_a_session_file_is_a_state_file(tmp_path):
    model, tokens = model_and_tokens("rwkv7-test")
    llm = LLM.from_runner(TorchRunner(model))
    session = llm.session()
    session.feed(tokens[0].tolist())
    session.save(tmp_path / "s")
    state = State.load(tmp_path / "s", model)
    assert state.tokens_seen.tolist() == [40]
    # and the other way round: a bare state has no logits, so something must be fed first
    state.save(tmp_path / "bare", model)
    bare = llm.session(tmp_path / "bare")
    assert bare.tokens_seen == 40
    with pytest.raises(ValueError, match="feed a prompt first"):
        bare.stream_tokens(1)
    bare.feed([3])
    session.feed([3])
    assert list(bare.stream_tokens(5, 0)) == list(session.stream_tokens(5, 0))


def test_threads_reach_torch():
    before = torch.get_num_threads()
    try:
        TorchRunner(create_model("rwkv7-test"), threads=2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
