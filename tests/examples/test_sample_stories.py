"""The example that samples the embedded model's corpus."""

import importlib.util
from pathlib import Path

import pytest
import torch
from support.language import randomise, some_tokens

from rookery.models import create_model

SCRIPT = Path(__file__).parents[2] / "examples" / "embedded_model" / "sample_stories.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("sample_stories", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def teacher():
    return randomise(create_model("transformer-test", vocab_size=20)).eval()


@torch.no_grad()
def test_a_step_in_place_equals_the_model_and_its_state(example, teacher):
    tokens, cache = some_tokens(teacher, 3, 12), example.Cache(teacher, 3)
    _, state = teacher(tokens[:, :5])
    cache.fill(state)
    for t in range(5, 12):
        logits, state = teacher(tokens[:, t : t + 1], state)
        got = example.step(teacher, tokens[:, t : t + 1], cache)
        torch.testing.assert_close(got, logits[:, 0], rtol=1e-4, atol=1e-5)
    assert cache.length == 12
    torch.testing.assert_close(cache.keys[1, :, :, :12], state.layers[1].keys, rtol=1e-4, atol=1e-5)


def test_streams_carry_the_likelihood_of_every_token(example, teacher):
    tokens, scores = example.sample_streams(teacher, rows=2, windows=2, temperature=0.6, top_p=0.95, seed=3)
    assert tokens.shape == scores.shape == (2, 256 + 128)
    assert (tokens[:, 0] == example.BOS).all()
    again, _ = example.sample_streams(teacher, rows=2, windows=2, temperature=0.6, top_p=0.95, seed=3)
    assert torch.equal(tokens, again)
    with torch.no_grad():
        first = teacher(tokens[:, :256])[0].log_softmax(-1).gather(2, tokens[:, 1:257, None])[:, :, 0]
        second = teacher(tokens[:, 128:])[0].log_softmax(-1).gather(2, tokens[:, 129:, None])[:, :, 0]
    torch.testing.assert_close(scores[:, 1:256], first[:, :-1], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(scores[:, 256:], second[:, 127:], rtol=1e-3, atol=1e-4)


def test_only_likely_tokens_are_drawn(example):
    logits = torch.tensor([[5.0, 4.0, -9.0, -9.0]]).repeat(200, 1)
    chosen, score = example.draw(logits, 1.0, 0.95, torch.Generator().manual_seed(0))
    assert set(chosen.flatten().tolist()) == {0, 1}
    torch.testing.assert_close(score, logits.log_softmax(-1).gather(1, chosen))


def test_stories_are_what_stands_between_two_starts(example):
    pieces = ["\n", "<s>", "a", "b", " "]
    found = example.stories([1, 4, 2, 3, 1, 3, 0, 1, 2, 2], [0, -1, -1, -2, -4, -3, -3, -3, -1, -1], pieces)
    assert found == [{"text": "ab", "score": -8 / 4}, {"text": "b", "score": -9 / 3}]


def test_the_vocabulary_has_spaces_and_line_feeds(example, tmp_path):
    (tmp_path / "tok.vocab").write_text("<unk>\t0\n<s>\t0\n\u2581\t-1\ne\t-2\n", encoding="utf-8")
    assert example.read_vocabulary(tmp_path / "tok.vocab") == ["\n", "<s>", " ", "e"]


@pytest.mark.data
def test_the_teacher_is_read_whole(example):
    from support.data import shared

    teacher = example.load_teacher(shared("models/babyllama/model5000.bin"))
    assert (teacher.config.num_hidden_layers, teacher.config.vocab_size) == (5, 105)
    assert len(example.read_vocabulary(shared("models/babyllama/tok105.vocab"))) == 105
