import itertools

import numpy as np
import pytest
import torch
from support.engine import Remembering
from support.language import randomised

from rookery.engine.beam import beam_search
from rookery.engine.llm import LLM
from rookery.engine.runners.torch import TorchRunner
from rookery.engine.sampling import log_softmax
from rookery.models import save_model

VOCAB = 4


def logprob(llm, prompt, text):
    ids = [*prompt, *text]
    rows = log_softmax(llm.logits(ids))[len(prompt) - 1 :]
    return sum(rows[i, token] for i, token in enumerate(text))


@pytest.fixture(scope="module", params=["native", "torch", "remembering"])
def llm(request, tmp_path_factory):
    if request.param == "remembering":
        return LLM.from_runner(Remembering(VOCAB))
    model = randomised("rwkv7-test", dtype=torch.float32, vocab_size=VOCAB)
    if request.param == "torch":
        return LLM.from_runner(TorchRunner(model))
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    save_model(model, path)
    return LLM(path, threads=1)


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_with_room_for_all_the_best_texts_are_found(llm, length_penalty):
    prompt, most = [1, 2], 3
    texts = [(*text, 0) for n in range(most) for text in itertools.product(range(1, VOCAB), repeat=n)]
    texts += itertools.product(range(1, VOCAB), repeat=most)
    scores = {text: logprob(llm, prompt, text) / len(text) ** length_penalty for text in texts}
    best = sorted(scores, key=lambda text: -scores[text])[:3]
    found = beam_search(llm, prompt, 100, most, length_penalty=length_penalty)[:3]
    assert [(*beam.tokens, 0) if beam.ended else beam.tokens for beam in found] == best
    for beam, text in zip(found, best):
        np.testing.assert_allclose(beam.logprob, logprob(llm, prompt, text), rtol=1e-4)


def test_one_beam_takes_the_likeliest_token_each_time(llm):
    session = llm.session()
    session.feed([3])
    (beam,) = beam_search(llm, [3], 1, 12)
    assert list(beam.tokens) == list(session.stream_tokens(12, temperature=0))


def test_more_beams_find_no_worse_text(llm):
    scores = [beam_search(llm, [1, 1], n, 6, length_penalty=0.0)[0].logprob for n in (1, 4, 32)]
    assert scores[0] <= scores[1] + 1e-6
    assert scores[1] <= scores[2] + 1e-6


def test_a_session_stays_as_it_is(llm):
    session = llm.session()
    session.feed([1, 2])
    found = [beam_search(llm, [3], 3, 5, session=session), beam_search(llm, [1, 2, 3], 3, 5)]
    assert [beam.tokens for beam in found[0]] == [beam.tokens for beam in found[1]]
    assert session.tokens_seen == 2


def test_what_makes_no_sense_is_refused(llm):
    with pytest.raises(ValueError, match="beams and max_tokens must be 1 or more, got 0 and 64"):
        beam_search(llm, [1], 0)
    with pytest.raises(ValueError, match="nothing to go on from"):
        beam_search(llm, [])
