import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rookery.tokenizers import Tokenizer, load_tokenizer
from rookery.tokenizers.byte_level import ByteTokenizer

BYTES = ByteTokenizer()


@pytest.mark.parametrize("name", ["world", "20b", "bytes"])
def test_every_tokenizer_keeps_the_contract(name):
    tokenizer = load_tokenizer(name)
    assert isinstance(tokenizer, Tokenizer)
    assert tokenizer.name == name
    text = "Tom's café costs 3 €. 你好 😀\n\nTabs\t and   spaces"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode(text.encode()) == ids
    assert b"".join(map(tokenizer.token_bytes, ids)) == tokenizer.decode_bytes(ids) == text.encode()
    assert max(ids) < tokenizer.vocab_size
    assert tokenizer.token_bytes(tokenizer.eos_id) == b""
    decoder = tokenizer.stream()
    assert "".join(map(decoder.push, ids)) + decoder.finish() == text


def test_stream_holds_back_only_what_may_become_a_character():
    decoder = BYTES.stream()
    assert [decoder.push(byte) for byte in "a😀b".encode()] == ["a", "", "", "", "😀", "b"]
    assert decoder.push(0xF0, 0x9F, 0x98) == ""
    assert decoder.pending == b"\xf0\x9f\x98"
    assert decoder.push(ord("x")) == "\ufffdx"


def test_stream_replaces_bytes_that_never_become_a_character_at_once():
    decoder = BYTES.stream()
    assert decoder.push(0xFF) == "\ufffd"
    assert decoder.push(0x80) == "\ufffd"
    assert decoder.pending == b""


def test_stream_ends_with_what_was_held_back():
    decoder = BYTES.stream()
    assert decoder.push(0xE4, 0xBD) == ""
    assert decoder.finish() == "\ufffd"
    assert decoder.finish() == ""
    assert decoder.push(65) == "A"


def test_stream_copies_go_on_by_themselves():
    decoder = BYTES.stream()
    decoder.push(0xC3)
    copy = decoder.copy()
    assert copy.push(0xA9) == "é"
    assert decoder.push(0xB6) == "ö"


@given(st.binary(max_size=40).map(lambda data: data.replace(b"\0", b"")))
@settings(max_examples=300, deadline=None)
def test_stream_gives_the_text_of_all_tokens_and_holds_at_most_three_bytes(data):
    decoder, text = BYTES.stream(), ""
    for byte in data:
        text += decoder.push(byte)
        assert len(decoder.pending) <= 3
    assert text + decoder.finish() == BYTES.decode(data)
