import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.data import shared

from rookery.errors import BadTokenizer
from rookery.tokenizers import load_tokenizer, trie
from rookery.tokenizers.reference import ReferenceTrie
from rookery.tokenizers.trie import TrieTokenizer

# core.md 3.1
GOLDEN = {
    "User: hi\n\nAssistant:": [24281, 59, 4571, 261, 5585, 41693, 59],
    " Eiffel": [304, 25740, 109],
    "The Eiffel tower is in the city of": [6699, 304, 25740, 109, 39990, 4600, 4596, 22590, 30449, 4706],
    "Hello, world!": [33155, 45, 40213, 34],
    "<think": [61, 35762],
    "<think>\n</think": [61, 35762, 63, 11, 754, 35762],
    "</think>": [754, 35762, 63],
    "你好": [10464, 11685],
    "😀": [3319, 153, 129],
    " \n": [265],
    "```json": [6884, 26060],
    "\nElon Musk has": [11, 994, 2098, 29435, 21800],
    "\n": [11],
    "\n\n": [261],
    "\t\t": [257],
    " " * 128: [65529],
    "": [],
}


def python_trie(pieces):
    return TrieTokenizer(ReferenceTrie(pieces), "world in Python")


@pytest.fixture(scope="module")
def world():
    return load_tokenizer("world")


@pytest.fixture(scope="module", params=["compiled", "python"])
def either(request, world):
    return world if request.param == "compiled" else python_trie(world.pieces)


@pytest.mark.parametrize("text", GOLDEN)
def test_world_gives_the_published_ids(either, text):
    assert either.encode(text) == GOLDEN[text]
    assert either.decode(GOLDEN[text]) == text


def test_world_has_every_byte_and_65529_pieces(world):
    assert world.vocab_size == 65530
    assert len(world.pieces) == 65529
    assert [world.encode(bytes([byte])) for byte in range(256)] == [[byte + 1] for byte in range(256)]
    assert world.missing_bytes == b""
    assert max(map(len, world.pieces.values())) == 128


def test_bytes_that_are_no_text_are_encoded_and_come_back(either):
    assert either.encode(b"\xff\xfe") == [256, 255]
    assert either.decode_bytes([256, 255]) == b"\xff\xfe"
    assert either.decode([256, 34]) == "\ufffd!"


def test_runs_of_spaces_take_the_longest_pieces(either):
    assert either.encode(" " * 300) == [65529, 65529, *either.encode(" " * 44)]


@given(st.binary(max_size=300))
@settings(max_examples=200, deadline=None)
def test_any_bytes_come_back_and_both_tries_agree(data):
    world, python = both()
    ids = world.encode(data)
    assert world.decode_bytes(ids) == data
    assert python.encode(data) == ids
    assert world.encode_array(data).tolist() == ids


WORDS = st.sampled_from(["  ", "\n", " the", "ing", "你好", "é", "\t\t", "0"])


@given(st.text(max_size=200), st.lists(WORDS, max_size=40))
@settings(max_examples=200, deadline=None)
def test_any_text_comes_back_and_both_tries_agree(text, words):
    world, python = both()
    text += "".join(words)
    ids = world.encode(text)
    assert world.decode(ids) == text
    assert python.encode(text) == ids


PAIR = []


def both():
    if not PAIR:
        world = load_tokenizer("world")
        PAIR.extend([world, python_trie(world.pieces)])
    return PAIR


@given(st.sets(st.binary(min_size=1, max_size=5), min_size=1, max_size=60), st.binary(max_size=60))
@settings(max_examples=300, deadline=None)
def test_both_tries_agree_on_any_vocabulary(pieces, data):
    numbered = dict(enumerate(sorted(pieces, key=hash), start=1))
    compiled, python = TrieTokenizer.from_pieces(numbered), python_trie(numbered)
    assert compiled.pieces == numbered
    assert compiled.missing_bytes == python.missing_bytes
    results = []
    for tokenizer in (compiled, python):
        try:
            results.append(tokenizer.encode(data))
        except BadTokenizer as error:
            results.append(str(error).split(";")[0])
    assert results[0] == results[1]


def test_a_piece_of_all_256_bytes_after_one_fits():
    # the widest block of siblings, and siblings with the first and the last byte only
    pieces = {byte + 1: bytes([byte]) for byte in range(256)} | {257 + byte: bytes([7, byte]) for byte in range(256)}
    pieces |= {600: b"\x08\x00", 601: b"\x08\xff"}
    tokenizer = TrieTokenizer.from_pieces(pieces)
    assert tokenizer.encode(bytes([7, 0, 7, 255, 8, 0, 8, 255, 8, 100])) == [257, 512, 600, 601, 9, 101]


def test_arrays_and_batches_hold_what_lists_hold(either):
    texts = ["Hello, world!", b"\xff", "", "你好" * 10]
    array = either.encode_array(texts[0])
    assert array.dtype == np.uint32
    assert array.tolist() == either.encode(texts[0])
    for threads in (0, 1, 2):
        batch = either.encode_batch(texts, threads)
        assert [ids.tolist() for ids in batch] == [either.encode(text) for text in texts]
    assert either.encode_batch([]) == []
    assert either.decode(array) == texts[0]


def test_many_documents_are_encoded_on_several_threads(world):
    texts = [f"Document {i} says {'so ' * (i % 50)}\n" for i in range(3000)]
    batch = world.encode_batch(texts, threads=2)
    assert all(ids.tolist() == world.encode(text) for ids, text in zip(batch, texts))


def test_long_texts_are_encoded_like_short_ones(world):
    text = "The Eiffel tower. 你好\n" * 2000
    assert world.encode(text) == world.encode("The Eiffel tower. 你好\n") * 2000


def test_unknown_ids_are_refused(either):
    for index in (65530, 70000, -1):
        with pytest.raises(BadTokenizer, match=rf"token {index} is unknown to the vocabulary .* end at 65529"):
            either.decode([11, index])


def test_end_of_text_has_no_bytes(either):
    assert either.eos_id == 0
    assert either.token_bytes(0) == b""
    assert either.decode([33155, 0, 34]) == "Hello!"


def test_lone_surrogates_are_refused_with_their_place(either):
    with pytest.raises(BadTokenizer, match="character 2 of the text is a lone surrogate"):
        either.encode("ab\ud83d")
    with pytest.raises(BadTokenizer, match="character 2 of the text is a lone surrogate"):
        either.encode_batch(["ok", "ab\ud83d"])


def test_what_is_neither_text_nor_bytes_is_a_type_error(world):
    with pytest.raises(TypeError, match="a text is str or bytes"):
        world.encode(17)


@pytest.mark.parametrize("make", [TrieTokenizer.from_pieces, python_trie])
def test_bytes_that_the_vocabulary_lacks_are_named(make):
    tokenizer = make({1: b"a", 2: b"ab", 5: b"xyz"})
    assert tokenizer.encode("aabxyz") == [1, 2, 5]
    assert len(tokenizer.missing_bytes) == 255
    message = r"offset 2: byte 0x7a cannot be encoded; the vocabulary .* lacks 255 of the 256 single bytes"
    with pytest.raises(BadTokenizer, match=message):
        tokenizer.encode("aazxy")
    with pytest.raises(BadTokenizer, match=message):
        tokenizer.encode_array("aazxy")
    with pytest.raises(BadTokenizer, match="text 1, " + message):
        tokenizer.encode_batch(["a", "aaz"])


def test_ids_may_have_gaps():
    tokenizer = TrieTokenizer.from_pieces({3: b"a", 7: b"b"})
    assert tokenizer.vocab_size == 8
    assert tokenizer.pieces == {3: b"a", 7: b"b"}
    with pytest.raises(BadTokenizer, match="token 5 is unknown"):
        tokenizer.decode([5])


@pytest.mark.parametrize("pieces", [{0: b"a"}, {2: b"a", 1: b"b"}, {1: b""}, {1: b"a", 2: b"a"}, {1 << 23: b"a"}])
def test_impossible_vocabularies_are_refused(pieces):
    with pytest.raises(BadTokenizer, match=r"ids must increase|two pieces are the same"):
        TrieTokenizer.from_pieces(pieces)


def test_saved_vocabulary_is_the_same_vocabulary(world, tmp_path):
    world.save(tmp_path / "vocab.txt")
    assert load_tokenizer(tmp_path / "vocab.txt").pieces == world.pieces


def test_unbuilt_checkout_uses_the_definition(monkeypatch, caplog):
    monkeypatch.setitem(__import__("sys").modules, "rookery._native", None)
    with caplog.at_level("INFO", logger="rookery"):
        tokenizer = TrieTokenizer.from_text(b"1 'a' 1\n2 'ab' 2\n", "small")
    assert tokenizer.encode("aba") == [2, 1]
    assert "the tokenizer runs in Python" in caplog.text


def test_native_trie_is_used_where_it_is_built():
    assert trie._native_trie() is not None


@pytest.mark.data
def test_real_text_in_four_languages_comes_back(world):
    for language in ("english", "french", "german", "spanish"):
        text = shared(f"text/wikipedia_{language}_20240801to20240831.json").read_text(encoding="utf-8")[:300_000]
        ids = world.encode(text)
        assert world.decode(ids) == text
        assert len(ids) < len(text) / 2.5
