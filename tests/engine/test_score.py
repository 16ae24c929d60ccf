import numpy as np
import pytest
import torch
from support.language import names, randomised

from rookery.engine.llm import LLM
from rookery.engine.runners.torch import TorchRunner
from rookery.engine.sampling import log_softmax
from rookery.models import save_model

TEXTS = ["hello", "", "x", "a longer text. " * 30, "hello"]


@pytest.fixture(scope="module", params=["native", "torch"])
def llm(request, tmp_path_factory):
    model = randomised("rwkv7-test", dtype=torch.float32, vocab_size=256)
    if request.param == "torch":
        return LLM.from_runner(TorchRunner(model))
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    save_model(model, path)
    return LLM(path, threads=1)


@pytest.mark.parametrize("bos", [True, False])
def test_scores_are_those_of_the_logits(llm, bos):
    scores = llm.score(TEXTS, bos=bos)
    for text, score in zip(TEXTS, scores):
        ids = list(text.encode())
        rows = log_softmax(llm.logits([0, *ids] if bos else ids))
        expected = [rows[i - (not bos), token] if i or bos else 0.0 for i, token in enumerate(ids)]
        np.testing.assert_allclose(score.logprobs, expected, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(score.logprob, sum(expected), rtol=1e-3, atol=1e-3)
        assert score.tokens == tuple(ids)
    assert scores[1].perplexity == 1
    np.testing.assert_allclose(scores[0].perplexity, np.exp(-scores[0].logprob / 5))


def test_one_text_gives_one_score(llm):
    assert llm.score("hello").logprob == llm.score(["hello"])[0].logprob
    assert llm.score([[104, 105]])[0].tokens == (104, 105)


def test_vectors_have_length_one_and_tell_texts_apart(llm):
    vectors = llm.embed(TEXTS)
    assert (vectors.dtype, vectors.shape) == (np.float32, (5, llm.runner.config.hidden_size))
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(vectors[0], vectors[4], rtol=1e-3, atol=1e-5)
    assert vectors[0] @ vectors[3] < 0.999
    np.testing.assert_allclose(llm.embed("hello"), vectors[0], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", names())
def test_every_registered_language_model_scores(name):
    llm = LLM.from_runner(TorchRunner(randomised(name, dtype=torch.float64)))
    texts = [[1, 2, 3], [4], [5] * 40]
    for text, score in zip(texts, llm.score(texts)):
        rows = log_softmax(llm.logits([0, *text]))
        np.testing.assert_allclose(score.logprobs, rows[np.arange(len(text)), text], rtol=1e-4, atol=1e-5)
    if any(name.endswith(".ffn_shift") for name in llm.fresh_state().tensors()):
        config = llm.runner.config
        assert llm.embed(texts).shape == (3, getattr(config, "perspectives", 1) * config.hidden_size)
    else:
        with pytest.raises(ValueError, match=r"the family \S+ keeps no vector of its last token"):
            llm.embed(texts)
