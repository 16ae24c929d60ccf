from pathlib import Path

import numpy as np
import pytest
import torch
from support.engine import Remembering
from support.language import randomised

from rookery.engine import reading
from rookery.engine.llm import LLM
from rookery.engine.reading import Place, load_reading, read_file, save_reading
from rookery.errors import BadState
from rookery.models import save_model
from rookery.tokenizers import load_tokenizer

TEXT = "Ein süßer Käse – and a quick brown fox.\n" * 120


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    save_model(randomised("rwkv7-test", dtype=torch.float32, vocab_size=256), path)
    return LLM(path, threads=1)


@pytest.fixture
def text(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "BLOCK", 1000)
    path = tmp_path / "text.txt"
    path.write_bytes(TEXT.encode())
    return path


def test_a_file_is_read_as_its_text(llm, text):
    session, whole = llm.session(), llm.session()
    places = [*read_file(session, text)]
    whole.feed(TEXT)
    assert session.tokens_seen == whole.tokens_seen
    assert (session._at.state.numbers == whole._at.state.numbers).all()
    assert [place.offset for place in places] == sorted({place.offset for place in places})
    assert places[-1].offset == places[-1].size == len(TEXT.encode())
    assert len(places) > 4


def test_tokens_are_those_of_the_whole_text_wherever_blocks_end(text):
    tokenizer = load_tokenizer("world")
    llm = LLM.from_runner(Remembering(tokenizer.vocab_size), tokenizer=tokenizer)
    llm.runner.forward = lambda tokens, state, logits: state.tokens.extend(tokens) or np.zeros((1, 1), np.float32)
    session = llm.session()
    for place in read_file(session, text):
        assert session._at.state.tokens == tokenizer.encode(TEXT.encode()[: place.offset])
    assert session._at.state.tokens == tokenizer.encode(TEXT)


@pytest.mark.parametrize("stop", [1, 3])
def test_reading_goes_on_where_it_was_left(llm, text, tmp_path, stop):
    session, whole = llm.session(), llm.session()
    places = read_file(session, text)
    place = [next(places) for _ in range(stop)][-1]
    places.close()
    save_reading(session, tmp_path / "s", place)
    session, start = load_reading(llm, tmp_path / "s")
    assert start == place
    *_, last = read_file(session, text, start)
    whole.feed(TEXT)
    assert last.offset == len(TEXT.encode())
    assert (session._at.state.numbers == whole._at.state.numbers).all()
    assert [*read_file(session, text, last)] == []


def test_a_place_in_another_text_is_refused(llm, text):
    session = llm.session()
    place = next(read_file(session, text))
    text.write_bytes(b"x" + TEXT.encode())
    with pytest.raises(BadState, match=r"is not the file that the session has read \d+ bytes of"):
        next(read_file(session, text, place))


def test_a_session_that_read_no_file_has_no_place(llm, tmp_path):
    session = llm.session()
    session.feed("hello")
    session.save(tmp_path / "s")
    again, place = load_reading(llm, tmp_path / "s")
    assert (again.tokens_seen, place) == (5, None)
    with pytest.raises(BadState, match="there is no state file"):
        load_reading(llm, tmp_path / "nothing")


def test_what_is_no_text_is_refused(llm, text):
    text.write_bytes(b"abc" * 400 + b"\xff")
    with pytest.raises(ValueError, match=r"'.*text.txt' is not UTF-8 text: .* after byte \d+"):
        list(read_file(llm.session(), text))
    text.write_bytes(b"")
    assert [*read_file(llm.session(), text)] == []


def test_places_are_only_told_where_they_are_known(llm, text, monkeypatch):
    """A tokenizer that changes the text knows no bytes of a token; then a place is told when all is read."""
    monkeypatch.setattr(type(llm.tokenizer), "token_bytes", lambda self, token: b"xx")
    monkeypatch.setattr(reading, "BLOCK", 1 << 16)
    places = [*read_file(llm.session(), text)]
    assert [place.offset for place in places] == [len(TEXT.encode())]
    assert isinstance(places[0], Place)


def resident():
    """Bytes of memory that the process has now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system does not tell memory in /proc")
def test_a_million_tokens_are_read_in_flat_memory(llm, tmp_path):
    path = tmp_path / "long.txt"
    path.write_bytes(b"It was a dark and stormy night. " * 31_250)
    session, used = llm.session(), []
    for place in read_file(session, path):
        if place.offset > 100_000:  # from here on everything has its size
            used.append(resident())
    assert session.tokens_seen == 1_000_000
    assert max(used) - used[0] < 4 << 20
