import json
import sys

import pytest

from rookery.errors import BadTokenizer, MissingDependency
from rookery.tokenizers import load_tokenizer
from rookery.tokenizers.huggingface import HuggingFaceTokenizer


@pytest.fixture(scope="module")
def neox():
    return load_tokenizer("20b")


def word_list(path, decoder):
    """A word-level tokenizer.json, as the MIDI models have."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = {"<eos>": 0, "play": 1, "ing": 2, "the": 3, "flute": 4, "é\ufffd": 5}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = getattr(decoders, decoder)() if decoder else None
    tokenizer.save(str(path))
    return HuggingFaceTokenizer(path)


def test_neox_gives_the_published_ids(neox):
    # core.md 3.2
    assert neox.encode("\n") == [187]
    assert neox.encode("\n\n") == [535]
    assert neox.encode("<|endoftext|>") == [0]
    assert neox.encode("  ") == [50276]
    assert neox.vocab_size == 50277
    assert neox.eos_id == 0


def test_neox_normalises_to_nfc_and_adds_no_space(neox):
    assert neox.encode("e\u0301") == neox.encode("é")
    assert neox.decode(neox.encode("hello")) == "hello"
    assert neox.encode("hello") != neox.encode(" hello")


def test_characters_in_pieces_are_streamed_whole(neox):
    ids = neox.encode("😀")
    assert len(ids) > 1
    decoder = neox.stream()
    assert [decoder.push(index) for index in ids] == [""] * (len(ids) - 1) + ["😀"]


def test_bytes_must_be_text(neox):
    with pytest.raises(BadTokenizer, match="offset 1: byte 0xff is not UTF-8; the tokenizer '20b' encodes only text"):
        neox.encode(b"a\xff")


def test_lone_surrogates_are_refused(neox):
    with pytest.raises(BadTokenizer, match="character 1 of the text is a lone surrogate"):
        neox.encode("a\ud83d")


def test_unknown_ids_are_refused(neox):
    with pytest.raises(BadTokenizer, match="token 50277 is unknown to the tokenizer '20b', whose ids end at 50276"):
        neox.decode([50277])


@pytest.mark.parametrize("decoder", [None, "WordPiece"])
def test_word_tokenizers_stream_what_each_word_adds(tmp_path, decoder):
    tokenizer = word_list(tmp_path / "tokenizer.json", decoder)
    ids = [1, 3, 4, 2]
    stream = tokenizer.stream()
    pieces = [stream.push(index) for index in ids]
    assert "".join(pieces) == tokenizer.decode(ids) == "play the flute ing"
    assert pieces == ["play", " the", " flute", " ing"]
    other = stream.copy()
    assert other.push(1) == stream.push(1) == " play"
    assert tokenizer.decode([1, 0]) == "play"


def test_word_streams_hold_back_broken_characters(tmp_path):
    stream = word_list(tmp_path / "tokenizer.json", None).stream()
    assert stream.push(5) == ""
    assert stream.copy().finish() == "é\ufffd"
    assert stream.push(1) == "é\ufffd play"
    assert stream.finish() == ""


def test_saved_tokenizer_is_the_same(neox, tmp_path):
    neox.save(tmp_path / "tokenizer.json")
    assert load_tokenizer(tmp_path).encode("The Eiffel tower") == neox.encode("The Eiffel tower")


def test_files_that_are_no_tokenizer_are_refused(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"version": "1.0"}))
    with pytest.raises(BadTokenizer, match=r"tokenizer.json' is not a tokenizer.json"):
        load_tokenizer(path)
    with pytest.raises(BadTokenizer, match=r"cannot read the tokenizer .*none\.json"):
        HuggingFaceTokenizer(tmp_path / "none.json")


def test_missing_package_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(MissingDependency, match="pip install tokenizers"):
        HuggingFaceTokenizer(tmp_path / "tokenizer.json")
