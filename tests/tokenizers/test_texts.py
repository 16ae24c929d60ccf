import gzip

import numpy as np
import pytest

from rookery.errors import BadTokenizer
from rookery.tokenizers.texts import END, START, TextInput, cleaned, clip_tokenizer, from_merges, word_tokenizer

# some of CLIP's merges with the ids that their tokens have there; letters come first in both
MERGES = [("r", "a"), ("d", "i"), ("a", "g"), ("ra", "m</w>"), ("ag", "ram</w>"), ("di", "agram</w>")]
IDS = {"ra": 559, "di": 570, "ag": 602, "ram</w>": 2007, "agram</w>": 2447, "diagram</w>": 22697}


@pytest.fixture(scope="module")
def clip():
    letters = list("!abcdefghijklmnopqrstuvwxyz")
    # the byte of a letter less 33, and 256 more at the end of a word: CLIP's numbers
    known = {x: ord(x) - 33 for x in letters} | {x + "</w>": ord(x) - 33 + 256 for x in letters}
    return TextInput(from_merges(MERGES, {**known, **IDS, START: 49406, END: 49407}), 49408, 77)


def test_known_texts_have_clips_ids(clip):
    row = clip("a diagram")[0]
    assert row[:5].tolist() == [49406, 320, 22697, 49407, 0]
    assert row.shape == (77,)
    assert not row[4:].any()
    assert clip(" A\n DIAGRAM ")[0].tolist() == row.tolist()


def test_a_long_text_keeps_its_end(clip):
    row = clip("a diagram " * 60)[0]
    assert row[0] == 49406
    assert row[-1] == 49407
    assert row[-2] in (320, 22697)


def test_escapes_of_web_pages_are_undone():
    assert cleaned("salt &amp;amp;\n pepper&lt;3") == "salt & pepper<3"


def test_ids_follow_the_merges_as_clips_do():
    tokenizer = from_merges(MERGES)
    assert tokenizer.vocab_size == 512 + len(MERGES) + 2
    assert tokenizer.encode("a diagram") == [320, 512 + 5]


def test_clips_file_is_read_and_others_are_refused(tmp_path, clip):
    letters = "abcdefghijklmnopqrstuvwxyz"
    made = [f"{a} {b}" for i in range(49152) for a, b in [(letters[i % 26], letters[i // 26 % 26])]]
    path = tmp_path / "bpe.txt.gz"
    path.write_bytes(gzip.compress(("version\n" + "\n".join(["d i", *made])).encode()))
    tokenizer = clip_tokenizer(path)
    assert tokenizer.vocab_size == 49408
    assert tokenizer.encode("di")[0] in (512, ord("d") - 33)
    tokenizer.save(tmp_path / "tokenizer.json")
    assert clip_tokenizer(tmp_path / "tokenizer.json").encode("a") == [320]
    path.write_bytes(gzip.compress(b"version\na b\n"))
    with pytest.raises(BadTokenizer, match="is not CLIP's list"):
        clip_tokenizer(path)
    path.write_bytes(b"\x1f\x8bdamaged")
    with pytest.raises(BadTokenizer, match="is damaged"):
        clip_tokenizer(path)
    with pytest.raises(BadTokenizer, match="cannot read the tokenizer"):
        clip_tokenizer(tmp_path / "nowhere.txt")


def test_words_are_numbered_by_frequency_and_others_are_0():
    tokenizer = word_tokenizer(["a red cat", "A blue cat!", "a"])
    assert tokenizer.encode("A cat") == [1, 2]
    assert tokenizer.encode("a green cat") == [1, 0, 2]
    assert word_tokenizer(["a b c a"], limit=1).vocab_size == 2
    texts = TextInput(tokenizer, tokenizer.vocab_size + 2, 4)
    assert texts(["a cat", "a red cat and more"]).tolist() == [[6, 1, 2, 7], [6, 1, texts("red")[0, 1], 7]]
    assert texts(["a", "cat"]).dtype == np.int64
    with pytest.raises(BadTokenizer, match="has 6 tokens, the model only 5"):
        TextInput(tokenizer, 5, 4)
    with pytest.raises(BadTokenizer, match="no word"):
        word_tokenizer(["", "  "])
