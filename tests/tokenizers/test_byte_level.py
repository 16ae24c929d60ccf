import pytest

from rookery.errors import BadTokenizer
from rookery.tokenizers.byte_level import ByteTokenizer, byte_letters


def test_ids_are_byte_values():
    tokenizer = ByteTokenizer()
    assert tokenizer.encode("hé") == [104, 195, 169]
    assert tokenizer.encode(b"\xff\n") == [255, 10]
    assert tokenizer.decode([104, 195, 169]) == "hé"
    assert tokenizer.vocab_size == 256


def test_end_of_text_has_no_bytes_and_broken_text_is_replaced():
    tokenizer = ByteTokenizer()
    assert tokenizer.token_bytes(0) == b""
    assert tokenizer.decode_bytes([65, 0, 66]) == b"AB"
    assert tokenizer.decode([65, 195]) == "A\ufffd"


@pytest.mark.parametrize("index", [-1, 256])
def test_ids_outside_the_bytes_are_refused(index):
    with pytest.raises(BadTokenizer, match=f"token {index} is unknown to the byte tokenizer; its ids are 0 to 255"):
        ByteTokenizer().decode([65, index])


def test_lone_surrogates_are_refused_with_their_place():
    with pytest.raises(BadTokenizer, match="character 2 of the text is a lone surrogate"):
        ByteTokenizer().encode("ab\ud83d")


def test_byte_tokenizer_has_no_file(tmp_path):
    with pytest.raises(BadTokenizer, match='name it "bytes"'):
        ByteTokenizer().save(tmp_path / "vocab.txt")


def test_byte_letters_are_256_distinct_printable_letters():
    letters = byte_letters()
    assert sorted(letters.values()) == list(range(256))
    assert (letters["A"], letters["Ġ"], letters["Ċ"]) == (65, 32, 10)
    assert all(letter.isprintable() for letter in letters)
