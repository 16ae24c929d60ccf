"""Kernel-upscaled states in the engine, many at once and beside plain ones: it is true that …"""

import pytest
import torch
from support.language import randomised, some_tokens

from rookery.adapt.kernel_state import KernelStart
from rookery.adapt.state_tuning import StartState, save_start
from rookery.engine.llm import LLM
from rookery.engine.runners.torch import TorchRunner
from rookery.engine.scheduler import Scheduler
from rookery.errors import BackendUnavailable, BadState
from rookery.models import save_model
from rookery.state import State


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, three kernel states (two of them alike in form) and a plain one."""
    folder = tmp_path_factory.mktemp("tuned")
    model = randomised("rwkv7-test", dtype=torch.float32).requires_grad_(False).eval()
    save_model(model, folder / "model.safetensors")
    starts = {
        "wide": KernelStart(model, features=48),
        "wider": KernelStart(model, features=64),
        "still": KernelStart(model, features=48, transition="none"),
        "plain": StartState(model),
    }
    for seed, (name, start) in enumerate(starts.items()):
        if name != "plain":
            start.calibrate(some_tokens(model, 2, 40, seed=seed))
        with torch.no_grad():
            for wkv in start.wkv:
                wkv.copy_(4 * torch.randn(wkv.shape, generator=torch.Generator().manual_seed(seed)))
        save_start(start, folder / f"{name}.safetensors", model)
    return folder, model, starts


def expected(start, prompt, count):
    model, state = start.model[0], start(1)
    tokens, found = torch.tensor([prompt]), []
    with torch.no_grad():
        for _ in range(count):
            logits, state = model(tokens, state)
            tokens = logits[:, -1:].argmax(-1)
            found.append(int(tokens))
    return found


PROMPTS = {"wide": [3, 4, 5], "wider": [9, 8, 7, 6], "still": [11], "plain": [20, 21], "none": [3, 4, 5]}
ASKED = {"temperature": 0, "ignore_eos": True}


def test_sessions_with_different_states_go_on_together_as_they_would_alone(folder):
    folder, model, starts = folder
    llm = LLM.from_runner(TorchRunner(model))
    with Scheduler(llm) as scheduler:
        asked = {}
        for name, prompt in PROMPTS.items():
            session = llm.session() if name == "none" else llm.session(state=folder / f"{name}.safetensors")
            asked[name] = scheduler.submit(prompt, 6, session=session, tokens=True, **ASKED)
        found = {name: list(generation) for name, generation in asked.items()}
    want = {name: expected(starts[name], PROMPTS[name], 6) for name in starts}
    assert found == want | {"none": expected(StartState(model), PROMPTS["none"], 6)}
    logits = [starts[name].model[0](torch.tensor([[3, 4, 5]]), starts[name](1))[0].detach() for name in starts]
    plain = model(torch.tensor([[3, 4, 5]]))[0]
    assert min(float((own - plain).abs().max()) for own in logits) > 1e-2, "every state says something"


def test_a_session_with_a_kernel_state_is_saved_forked_and_continued(folder, tmp_path):
    folder, _, starts = folder
    llm = LLM(folder / "model.safetensors", device="cpu")
    session = llm.session(state=folder / "wide.safetensors")
    session.feed([3, 4, 5])
    branch = session.fork()
    first = list(session.stream_tokens(4, **ASKED))
    session.save(tmp_path / "talk.state")
    again = llm.session(state=tmp_path / "talk.state")
    assert first + list(again.stream_tokens(3, **ASKED)) == expected(starts["wide"], [3, 4, 5], 7)
    assert list(branch.stream_tokens(4, **ASKED)) == first
    kernel, plain = session.nbytes, llm.session().nbytes
    assert kernel - plain == 3 * (2 * 4 * 32 * 48 + 2 * 4 * 4)


def test_the_compiled_runtime_refuses_it_and_says_what_to_do(folder):
    folder, _, _ = folder
    llm = LLM(folder / "model.safetensors")
    assert llm.runner.name == "native"
    with pytest.raises(BackendUnavailable, match=r"hosts no kernel-upscaled states; run the model with torch"):
        llm.session(state=folder / "wide.safetensors")
    llm.session(state=folder / "plain.safetensors")


def test_a_plain_model_says_that_the_state_is_of_another_kind(folder):
    folder, model, starts = folder
    with pytest.raises(BadState, match=r"wide\.safetensors' does not fit"):
        State.load(folder / "wide.safetensors", model)
    host = starts["wide"].model[0]
    assert State.load(folder / "wide.safetensors", host).tensors().keys() == starts["wide"](1).tensors().keys()


def test_another_family_refuses_it(folder):
    folder, _, _ = folder
    other = randomised("rwkv6-test", dtype=torch.float32)
    with pytest.raises(BadState, match="tuned state of another model"):
        LLM.from_runner(TorchRunner(other)).session(state=folder / "wide.safetensors")


def test_models_that_host_none_refuse_its_arrays(folder):
    _, _, starts = folder
    runner = TorchRunner(randomised("meta-state-test", dtype=torch.float32))
    with pytest.raises(BadState, match=r"cannot start this model: kernel states are read by .* is meta-state"):
        runner.init_state(starts["wide"](1).detach().arrays())


def test_plain_states_go_on_together_in_the_compiled_runtime(folder):
    folder, model, starts = folder
    llm = LLM(folder / "model.safetensors")
    assert llm.runner.name == "native"
    with Scheduler(llm) as scheduler:
        session = llm.session(state=folder / "plain.safetensors")
        tuned = scheduler.submit([20, 21], 6, session=session, tokens=True, **ASKED)
        fresh = scheduler.submit([20, 21], 6, tokens=True, **ASKED)
        assert list(tuned) == expected(starts["plain"], [20, 21], 6)
        assert list(fresh) == expected(StartState(model), [20, 21], 6)
