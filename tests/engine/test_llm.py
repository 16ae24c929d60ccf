import sys

import numpy as np
import pytest
import torch
from support.engine import Pieces, scripted
from support.language import randomised

from rookery.engine.llm import LLM
from rookery.errors import BackendUnavailable, BadCheckpoint, BadTokenizer, MissingDependency, UnknownName
from rookery.models import save_model


@pytest.fixture(scope="module")
def model():
    return randomised("rwkv7-test", dtype=torch.float32, vocab_size=256)


@pytest.fixture(scope="module")
def path(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    save_model(model, path)
    return path


def test_a_file_gives_the_models_logits(path, model):
    tokens = torch.arange(1, 60)
    with torch.no_grad():
        expected = model(tokens[None])[0][0].numpy()
    logits = LLM(path).logits(tokens.tolist())
    assert (logits.dtype, logits.shape) == (np.float32, (59, 256))
    np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-4)


def test_long_texts_have_the_logits_of_one_call(path, model):
    tokens = torch.arange(1300) % 250
    with torch.no_grad():
        expected = model(tokens[None])[0][0].numpy()
    np.testing.assert_allclose(LLM(path).logits(tokens.numpy()), expected, rtol=1e-2, atol=1e-3)


def test_text_and_ids_are_the_same_prompt(path):
    llm = LLM(path)
    assert llm.generate("hello", 20, seed=1) == llm.generate(list(b"hello"), 20, seed=1)
    assert llm.generate(np.frombuffer(b"hello", np.uint8), 20, seed=1) == llm.generate("hello", 20, seed=1)


def test_the_stream_is_the_text(path):
    llm = LLM(path)
    options = {"seed": 3, "top_p": 0.95, "ignore_eos": True}
    pieces = list(llm.stream("hello", 200, **options))
    assert len(pieces) > 100
    assert "".join(pieces) == llm.generate("hello", 200, **options)
    assert llm.generate("hello", 200, **options | {"seed": 4}) != "".join(pieces)


def test_the_text_is_that_of_its_tokens(path):
    llm = LLM(path)
    session = llm.session()
    session.feed("hello")
    ids = list(session.stream_tokens(200, seed=3, top_p=0.95, ignore_eos=True))
    assert llm.generate("hello", 200, seed=3, top_p=0.95, ignore_eos=True) == llm.tokenizer.decode(ids)


def test_bos_puts_token_zero_in_front(path):
    llm = LLM(path)
    assert llm.generate("hi", 20, bos=True, temperature=0) == llm.generate([0, *b"hi"], 20, temperature=0)


def test_a_folder_with_a_vocabulary_is_a_model(tmp_path, model):
    from rookery.tokenizers.vocabulary import write_vocabulary

    save_model(randomised("rwkv7-test", dtype=torch.float32, vocab_size=300), tmp_path / "model.safetensors")
    write_vocabulary([*(bytes([i]) for i in range(256)), b"hello"], tmp_path / "vocab.txt")
    llm = LLM(tmp_path)
    assert llm.tokens_of("hello!") == [257, 1 + ord("!")]
    assert len(llm.generate("hello", 5, ignore_eos=True, banned=tuple(range(258, 300)))) > 0


def test_the_embedded_model_is_found_in_its_folder(monkeypatch, path):
    monkeypatch.setattr("rookery.engine.llm.EMBEDDED", path.parent)
    assert LLM().path == path.parent
    monkeypatch.setattr("rookery.engine.llm.EMBEDDED", path.parent / "absent")
    with pytest.raises(BadCheckpoint, match="has no embedded model; give the path of a model file"):
        LLM()


def test_token_ids_need_no_tokenizer(tmp_path):
    save_model(randomised("rwkv7-test", dtype=torch.float32, vocab_size=100), tmp_path / "m.safetensors")
    llm = LLM(tmp_path / "m.safetensors")
    assert llm.logits([1, 2, 3]).shape == (3, 100)
    session = llm.session()
    session.feed([1, 2])
    assert len(list(session.stream_tokens(5, ignore_eos=True))) == 5
    with pytest.raises(BadTokenizer, match=r"model of 100 tokens .*--tokenizer"):
        llm.generate("hello")


def test_a_tokenizer_may_be_given(path):
    tokenizer = Pieces(["", "he", "llo"])
    llm = LLM(path, tokenizer=tokenizer)
    assert llm.tokens_of("hello") == [1, 2]
    assert LLM(path, tokenizer="bytes").tokens_of("hello") == list(b"hello")


@pytest.mark.parametrize(("tokens", "message"), [([256], "got token 256"), ([-1], "got token -1")])
def test_tokens_that_the_model_does_not_know_are_refused(path, tokens, message):
    llm = LLM(path)
    for call in (llm.logits, llm.session().feed, llm.generate):
        with pytest.raises(ValueError, match=f"{message}, the model knows 0 to 255"):
            call(tokens)


def test_ids_must_be_whole_numbers(path):
    with pytest.raises(TypeError):
        LLM(path).logits([1.5])


def test_what_cannot_be_is_refused(path):
    with pytest.raises(UnknownName, match="quantize='int3' is not supported; supported: "):
        LLM(path, quantize="int3")
    with pytest.raises(ValueError, match="threads must be 1 or more, got 0"):
        LLM(path, threads=0)
    with pytest.raises(ValueError, match="device='abacus' cannot be used"):
        LLM(path, device="abacus")
    with pytest.raises(BadCheckpoint, match="there is no file"):
        LLM(path.parent / "nothing.pth")
    with pytest.raises(ValueError, match="isa='avx2' is for the compiled runtime, device='cpu' for torch"):
        LLM(path, isa="avx2", device="cpu")
    with pytest.raises(UnknownName, match="isa 'abacus' is not one of"):
        LLM(path, isa="abacus")


def test_the_compiled_runtime_runs_what_it_knows_and_torch_the_rest(path, tmp_path, caplog):
    assert LLM(path).runner.name == "native"
    assert LLM(path, device="cpu").runner.name == "torch"
    other = tmp_path / "transformer.safetensors"
    save_model(randomised("transformer-test", dtype=torch.float32, vocab_size=256), other)
    with caplog.at_level("INFO", "rookery"):
        llm = LLM(other)
    assert llm.runner.name == "torch"
    assert "the compiled runtime runs" in caplog.text
    assert len(llm.generate("hello", 5, ignore_eos=True)) > 0
    with pytest.raises(BackendUnavailable, match="the compiled runtime runs"):
        LLM(other, isa="portable")


def test_both_runners_give_the_same_logits(path):
    tokens = [(7 * i) % 256 for i in range(300)]
    native, by_torch = LLM(path).logits(tokens), LLM(path, device="cpu").logits(tokens)
    np.testing.assert_allclose(native, by_torch, rtol=1e-3, atol=1e-3 * np.abs(by_torch).max())


@pytest.mark.parametrize("devices", [(None, "cpu"), ("cpu", None)])
def test_a_session_goes_from_one_runner_to_the_other(path, tmp_path, devices):
    first, second = (LLM(path, device=device) for device in devices)
    session = first.session()
    session.feed("hello")
    session.generate(10, temperature=0, ignore_eos=True)
    session.save(tmp_path / "s")
    moved = second.session(tmp_path / "s")
    assert moved.tokens_seen == session.tokens_seen == 15
    texts = [s.generate(20, temperature=0, ignore_eos=True) for s in (session, moved)]
    assert texts[0] == texts[1]
    np.testing.assert_allclose(session._at.logits, moved._at.logits, rtol=1e-2, atol=1e-2)


def test_a_missing_torch_is_named(path, tmp_path, monkeypatch):
    other = tmp_path / "transformer.safetensors"
    save_model(randomised("transformer-test", dtype=torch.float32), other)
    for name in ("torch", "rookery.engine.runners.torch"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingDependency, match=r'pip install "rookery\[torch\]"'):
        LLM(path, device="cpu")
    with pytest.raises(MissingDependency, match=r'the compiled runtime runs .* pip install "rookery\[torch\]"'):
        LLM(other)
    assert LLM(path).runner.name == "native"


CHAT = [
    "",
    "User: hi\n\nAssistant:",
    "\n\nUser: more\n\nAssistant:",
    " Hello",
    "\n\n",
    "User",
    ":",
    " there",
    " x",
    "System: s\n\n",
]


def test_say_follows_the_template_and_ends_before_the_next_turn():
    llm = scripted([1], [" Hello", " there", "\n\n", "User", ":"], CHAT)
    llm._template = "g1"
    session = llm.session()
    assert session.say("hi", temperature=0) == "Hello there"
    assert session.tokens_seen == 3
    assert session._at.state.tokens == [1, 3, 7]


def test_the_second_turn_follows_a_blank_line():
    llm = scripted([1], [" Hello", "", "", " x"], CHAT)
    llm._template = "g1"
    session = llm.session()
    session.say("hi", temperature=0)
    session.say("more", temperature=0)
    assert session._at.state.tokens[:3] == [1, 3, 2]


def test_a_system_turn_comes_first():
    llm = scripted([9, 1], [" Hello"], CHAT)
    llm._template = "g1"
    session = llm.session()
    assert session.say("hi", temperature=0, system="s") == "Hello"
    assert session._at.state.tokens[:2] == [9, 1]


def test_a_model_without_a_template_offers_generate(path):
    with pytest.raises(ValueError, match=r"no chat template .*'tiny.safetensors': use `generate`.*g1, world, raven"):
        LLM(path).session().say("hi")
    with pytest.raises(UnknownName, match="no chat template named 'g2'"):
        _ = LLM(path, template="g2").template


def test_the_file_name_tells_the_template(tmp_path, path):
    named = tmp_path / "rwkv7-g1d-0.1b-20260101-ctx8192.safetensors"
    named.write_bytes(path.read_bytes())
    assert LLM(named).template.name == "g1"
    assert LLM(named, template="world").template.name == "world"


def test_what_no_file_tells_may_be_said(tmp_path):
    model = randomised("rosa-4bit-test", dtype=torch.float32)
    torch.save(model.state_dict(), tmp_path / "rosa.pth")
    tokens = [1, 2, 3, 1, 2, 3, 1, 2]
    with torch.no_grad():
        expected = model(torch.tensor([tokens]))[0][0].numpy()
    assert np.abs(LLM(tmp_path / "rosa.pth").logits(tokens) - expected).max() > 1e-3
    told = LLM(tmp_path / "rosa.pth", settings={"bits": 4})
    assert told.runner.config == model.config
    np.testing.assert_allclose(told.logits(tokens), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(UnknownName, match="no setting named 'bit'. Did you mean 'bits'"):
        LLM(tmp_path / "rosa.pth", settings={"bit": 4})
    with pytest.raises(ValueError, match=r"bits \(5\) must be 1 to 8 and divide hidden_size"):
        LLM(tmp_path / "rosa.pth", settings={"bits": 5})
    with pytest.raises(BadCheckpoint, match="'emb.weight' has shape"):
        LLM(tmp_path / "rosa.pth", settings={"vocab_size": 65})


def test_a_prompt_of_a_pile_model_ends_as_in_the_official_chat(tmp_path):
    save_model(randomised("rwkv4-test", dtype=torch.float32, vocab_size=50277), tmp_path / "raven.safetensors")
    llm = LLM(tmp_path / "raven.safetensors")
    assert llm.tokenizer.name == "20b"
    assert llm.tokens_of("Bob: hi\n\n")[-2:] == [187, 187]
