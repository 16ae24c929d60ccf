import itertools

import numpy as np
import pytest
import torch
from support.engine import Remembering
from support.language import randomised

from rookery.engine.llm import LLM
from rookery.engine.runners.torch import TorchRunner
from rookery.engine.sampling import log_softmax
from rookery.engine.session import Session
from rookery.engine.speculate import DraftModel, Lookup
from rookery.models import save_model

DRAWN = {"top_p": 1.0, "ignore_eos": True, "seed": 5}
REPETITIVE = [1, 2, 3, 4, 5, 6, 7] * 8


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    save_model(randomised("rwkv7-test", dtype=torch.bfloat16, vocab_size=16), path)
    return path


@pytest.fixture(scope="module")
def llm(path):
    return LLM(path, threads=1)


def written(llm, prompt, n, **options):
    session = llm.session()
    session.feed(prompt)
    stream = session.stream_tokens(n, **options)
    return list(stream), stream, session


class Oracle:
    """Guesses what it was told will come, wrong at some places."""

    def __init__(self, future, wrong=(), tokens=5):
        self.future, self.wrong, self.tokens, self.place = future, {*wrong}, tokens, 0

    def start(self, session, order):
        return self

    def accept(self, tokens):
        self.place += len(tokens)

    def guess(self, count):
        places = range(self.place, min(self.place + count, len(self.future)))
        return [(self.future[i] + (i in self.wrong)) % 16 for i in places]


@pytest.mark.parametrize("temperature", [0, 0.7, 1.5])
@pytest.mark.parametrize("speculate", [1, 8, Lookup(5, shortest=1)])
def test_guessing_changes_no_token_and_no_bit_of_the_state(llm, temperature, speculate):
    options = DRAWN | {"temperature": temperature, "presence_penalty": 0.3, "frequency_penalty": 0.1}
    llm.__dict__["tokenizer"] = type("", (), {"token_bytes": staticmethod(lambda i: b"x")})
    expected, _, plain = written(llm, REPETITIVE, 60, **options)
    got, stream, session = written(llm, REPETITIVE, 60, speculate=speculate, **options)
    assert got == expected
    assert session.tokens_seen == plain.tokens_seen
    assert (session._at.state.numbers == plain._at.state.numbers).all()
    assert (session._at.logits == plain._at.logits).all()
    assert stream.guessed[0] >= stream.guessed[1]


@pytest.mark.parametrize("wrong", [(), (3,), (4, 5, 6), range(40), range(0, 40, 2), (7, 19)])
def test_right_and_wrong_guesses_give_the_same_text(llm, wrong):
    expected, _, plain = written(llm, [1, 2, 3], 40, **DRAWN)
    got, stream, session = written(llm, [1, 2, 3], 40, speculate=Oracle(expected, wrong), **DRAWN)
    assert got == expected
    assert session.tokens_seen == plain.tokens_seen == 43
    assert (session._at.state.numbers == plain._at.state.numbers).all()
    guessed, right = stream.guessed
    if not wrong:
        assert guessed == right > 30
    if wrong == range(40):
        assert guessed > right == 0


def test_right_guesses_save_calls():
    llm = LLM.from_runner(Remembering(16))
    expected, _, _ = written(llm, [1, 2], 40, **DRAWN)
    plain = len(llm.runner.calls)
    llm.runner.calls.clear()
    assert written(llm, [1, 2], 40, speculate=Oracle(expected, tokens=8), **DRAWN)[0] == expected
    assert len(llm.runner.calls) < plain / 4


def test_a_session_used_in_the_middle_of_guesses_stands_where_it_is(llm):
    expected, _, _ = written(llm, [1, 2, 3], 30, **DRAWN)
    session = llm.session()
    session.feed([1, 2, 3])
    stream = session.stream_tokens(30, speculate=Oracle(expected), **DRAWN)
    got = []
    for i, token in enumerate(stream):
        got.append(token)
        if i % 4 == 1:
            branch = session.fork()
            assert list(branch.stream_tokens(30 - len(got), **DRAWN)) == expected[len(got) :]
        if i % 7 == 3:
            assert session.tokens_seen == 3 + len(got)
    assert got == expected


def test_texts_of_a_draft_model_are_those_of_the_model(llm, path):
    expected, _, _ = written(llm, REPETITIVE, 40, **DRAWN)
    same = DraftModel(LLM(path, threads=1), 3)
    got, stream, _ = written(llm, REPETITIVE, 40, speculate=same, **DRAWN)
    assert got == expected
    guessed, right = stream.guessed
    assert guessed == right > 20  # it is the same model, and draws with the same numbers
    other = DraftModel(LLM.from_runner(TorchRunner(randomised("rwkv6-test", dtype=torch.float32, vocab_size=16))))
    got, stream, _ = written(llm, REPETITIVE, 40, speculate=other, **DRAWN)
    assert got == expected
    assert stream.guessed[0] > stream.guessed[1]


def test_a_stop_string_in_guessed_text_leaves_no_trace(tmp_path):
    save_model(randomised("rwkv7-test", dtype=torch.float32, vocab_size=256), tmp_path / "m.safetensors")
    llm = LLM(tmp_path / "m.safetensors", threads=1)
    prompt = [1, 2, 3] * 9
    session = llm.session()
    session.feed(prompt)
    free = session.stream_tokens(40, **DRAWN)
    tokens = list(free)
    ascii_pairs = [i for i in range(5, 38) if max(tokens[i : i + 2]) < 128]
    stop = bytes(tokens[ascii_pairs[0] : ascii_pairs[0] + 2]).decode()
    ends = []
    for speculate in (None, Oracle(tokens)):
        session: Session = llm.session()
        session.feed(prompt)
        stream = session.stream(40, stop=stop, speculate=speculate, **DRAWN)
        ends.append(("".join(stream), stream.finish_reason, session.tokens_seen))
        state = session._at.state.numbers
        ends[-1] += (state.tobytes(),)
    assert ends[0][1] == "stop"
    assert ends[0] == ends[1]


def test_what_cannot_guess_is_refused(llm):
    with pytest.raises(ValueError, match="tokens and shortest must be 1 or more, got 0 and 3"):
        Lookup(0)
    with pytest.raises(ValueError, match="tokens must be 1 or more, got 0"):
        DraftModel(llm, 0)
    with pytest.raises(ValueError, match="the draft model knows 32 tokens, the model 16"):
        written(llm, [1], 3, speculate=DraftModel(LLM.from_runner(Remembering(32))))


def chi_square(llm, draws):
    """How far the first three tokens of guessed texts are from the model's probabilities; 64 cells, 63 free."""
    prompt = [1, 2, 3] * 4
    expected = np.zeros((4, 4, 4))
    for first, second in itertools.product(range(4), repeat=2):
        rows = np.exp(log_softmax(llm.logits([*prompt, first, second])[-3:]).astype(np.float64))
        expected[first, second] = rows[0, first] * rows[1, second] * rows[2]
    counts, guesses, session = np.zeros_like(expected), np.zeros(2), llm.session()
    session.feed(prompt)
    options = {"top_p": 1.0, "ignore_eos": True, "speculate": Lookup(3, shortest=1)}
    for seed in range(draws):
        stream = session.fork().stream_tokens(3, seed=seed, **options)
        counts[tuple(stream)] += 1
        guesses += stream.guessed
    assert 0.05 < guesses[1] / guesses[0] < 0.95
    return ((counts - draws * expected) ** 2 / (draws * expected)).sum()


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "four.safetensors"
    save_model(randomised("rwkv7-test", dtype=torch.float32, vocab_size=4), path)
    return LLM(path, threads=1)


LIMIT = 103.4
"""Chi-square with 63 degrees of freedom is larger in one of a thousand trials."""


def test_guessed_texts_are_drawn_with_the_models_probabilities(four):
    assert chi_square(four, 2000) < LIMIT


@pytest.mark.slow
def test_a_hundred_thousand_guessed_texts_are_drawn_with_the_models_probabilities(four):
    assert chi_square(four, 100_000) < LIMIT
