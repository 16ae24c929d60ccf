import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rookery._native import Trie

from rookery.errors import BadTokenizer
from rookery.tokenizers.pairing import ASSETS
from rookery.tokenizers.trie import TrieTokenizer
from rookery.tokenizers.vocabulary import format_vocabulary, parse_vocabulary, write_vocabulary

WORLD = ASSETS / "rwkv_vocab_v20230424.txt"


def compiled_pieces(data):
    trie = Trie.parse(data)
    return None if trie is None else TrieTokenizer(trie, "test").pieces


def test_compiled_parser_reads_the_world_file_as_python_does():
    data = WORLD.read_bytes()
    pieces = parse_vocabulary(data)
    assert len(pieces) == 65529
    assert compiled_pieces(data) == pieces
    assert compiled_pieces(data.replace(b"\n", b"\r\n")) == pieces
    assert parse_vocabulary(data.replace(b"\n", b"\r\n")) == pieces
    assert format_vocabulary(pieces) == format_vocabulary(compiled_pieces(format_vocabulary(pieces)))


PIECES = st.one_of(st.binary(min_size=1, max_size=8), st.text(min_size=1, max_size=4).map(str.encode))


@given(st.sets(PIECES, min_size=1, max_size=30))
@settings(max_examples=300, deadline=None)
def test_any_pieces_written_read_back_the_same_by_both_parsers(pieces):
    numbered = dict(enumerate(pieces, start=1))
    data = format_vocabulary(numbered)
    assert parse_vocabulary(data) == numbered
    assert compiled_pieces(data) == numbered


BAD = {
    "1 'a'\n": "line 1: \"1 'a'\" is not `id 'piece' length`",
    "hello\n": "line 1: 'hello' is not `id 'piece' length`",
    "1 'a' 1\n\n3 'b' 1\n": "line 2: '' is not `id 'piece' length`",
    "1 'a' 1\n2 'b' 2\n": "line 2: \"'b'\" has 1 bytes, the line says 2",
    "1 'é' 1\n": "line 1: \"'é'\" has 2 bytes, the line says 1",
    "1 'a' 1\n1 'b' 1\n": "line 2: id 1 after id 1; ids start at 1 and increase",
    "0 'a' 1\n": "line 1: id 0 after id 0",
    "1 'a' 1\n2 'b' 1\n3 'a' 1\n": r"line 3: b'a' is already on line 1; remove one of the two",
    "1 b'\\x00' 1\n2 '\\x00' 1\n": r"line 2: b'\\x00' is already on line 1",
    "1 '' 0\n": "a piece is a string or bytes of 1 to 65535 bytes",
    "1 17 2\n": "a piece is a string or bytes of 1 to 65535 bytes",
    "1 'a 1\n": 'line 1: "\'a" is not a Python string or bytes literal',
    "1 __import__('os') 1\n": "is not a Python string or bytes literal",
    "1 '\\ud800' 3\n": "is not a Python string or bytes literal",
    "8388608 'a' 1\n": "line 1: id 8388608 is larger than 8388607",
    "-1 'a' 1\n": "is not `id 'piece' length`",
    "": "line 1: '' is not `id 'piece' length`",
}


@pytest.mark.parametrize("text", BAD)
def test_damaged_lines_are_named(text, tmp_path):
    path = tmp_path / "bad.txt"
    path.write_bytes(text.encode("utf-8"))
    with pytest.raises(BadTokenizer) as error:
        TrieTokenizer.from_file(path)
    assert str(error.value).startswith("bad.txt, line")
    assert BAD[text].replace("\\\\", "\\") in str(error.value)


def test_literals_that_repr_never_writes_are_read_by_python():
    data = b"1 '\\101' 1\n2 'x' 'y' 2\n3 r'\\n' 2\n4 '\\N{BULLET}' 3\n"
    assert Trie.parse(data) is None
    assert TrieTokenizer.from_text(data, "odd").pieces == {1: b"A", 2: b"xy", 3: b"\\n", 4: "•".encode()}


def test_pieces_with_spaces_quotes_and_escapes_are_read():
    pieces = {1: b" ' ", 2: b'"', 3: b"' \"", 5: b"\\", 6: b"\n ", 9: b"\x80 ", 10: "\x80 é\u2028😀".encode()}
    data = format_vocabulary(pieces)
    assert compiled_pieces(data) == parse_vocabulary(data) == pieces


def test_missing_file_is_named(tmp_path):
    with pytest.raises(BadTokenizer, match=r"cannot read the vocabulary .*none\.txt.*No such file"):
        TrieTokenizer.from_file(tmp_path / "none.txt")


def test_vocabularies_that_cannot_be_read_back_are_not_written(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("before")
    with pytest.raises(BadTokenizer, match="already on line 1"):
        write_vocabulary([b"a", b"a"], path)
    assert path.read_text() == "before"
    assert [file.name for file in tmp_path.iterdir()] == ["vocab.txt"]
