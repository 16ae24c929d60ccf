import json

import pytest

from rookery.errors import BadTokenizer
from rookery.tokenizers import load_tokenizer, resolve
from rookery.tokenizers.pairing import ASSETS, from_gguf_tokens
from rookery.tokenizers.vocabulary import write_vocabulary

SMALL = [bytes([byte]) for byte in range(256)] + [b" the", b"\n\n"]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "model.pth").write_bytes(b"")
    return tmp_path


@pytest.mark.parametrize(("rows", "name"), [(65536, "world"), (50277, "20b"), (50304, "20b"), (256, "bytes")])
def test_rows_tell_the_tokenizer(rows, name, folder):
    assert resolve(vocab_size=rows).name == name
    assert resolve(vocab_size=rows, path=folder / "model.pth").name == name


def test_other_sizes_are_refused_with_the_remedy(folder):
    with pytest.raises(BadTokenizer, match=r"a model of 20096 tokens .* name one with --tokenizer: world, 20b, bytes"):
        resolve(vocab_size=20096, path=folder / "model.pth")


def test_the_users_choice_comes_first(folder):
    assert resolve("bytes", vocab_size=65536, metadata={"tokenizer": "world"}).name == "bytes"


def test_metadata_names_a_tokenizer_or_a_file_beside_the_model(folder):
    write_vocabulary(SMALL, folder / "words.txt")
    assert resolve(vocab_size=70000, metadata={"tokenizer": "world"}).name == "world"
    for path in (folder, folder / "model.pth"):
        found = resolve(vocab_size=300, path=path, metadata={"tokenizer": "words.txt"})
        assert found.encode(" the") == [257]


@pytest.mark.parametrize("name", ["model.json", "model.pth.json"])
def test_sidecar_names_a_tokenizer(folder, name):
    (folder / name).write_text(json.dumps({"tokenizer": "bytes"}))
    assert resolve(vocab_size=1000, path=folder / "model.pth").name == "bytes"


@pytest.mark.parametrize("content", ['{"family": "rwkv7"}', "[1]"])
def test_sidecar_without_a_tokenizer_changes_nothing(folder, content):
    (folder / "model.json").write_text(content)
    assert resolve(vocab_size=256, path=folder / "model.pth").name == "bytes"


def test_damaged_sidecar_is_named(folder):
    (folder / "model.json").write_text("{")
    with pytest.raises(BadTokenizer, match=r"model.json', which describes the model, is not JSON"):
        resolve(vocab_size=256, path=folder / "model.pth")


def test_tokenizer_of_the_folder_is_found(folder):
    write_vocabulary(SMALL, folder / "vocab.txt")
    assert resolve(vocab_size=259, path=folder).name == "vocab.txt"
    assert resolve(vocab_size=259, path=folder / "model.pth").name == "vocab.txt"
    # a folder is one model, while a file may lie beside a stranger's vocabulary
    assert resolve(vocab_size=65536, path=folder).name == "vocab.txt"
    assert resolve(vocab_size=65536, path=folder / "model.pth").name == "world"


def test_tokenizer_larger_than_the_model_is_refused(folder):
    write_vocabulary(SMALL, folder / "vocab.txt")
    with pytest.raises(BadTokenizer, match=r"'vocab.txt' has 259 tokens, the model only 258.*--tokenizer"):
        resolve(vocab_size=258, path=folder)


def test_names_and_files_and_folders_are_loaded(folder):
    write_vocabulary(SMALL, folder / "vocab.txt")
    assert load_tokenizer(folder).encode(" the\n\n") == [257, 258]
    assert load_tokenizer(folder / "vocab.txt").encode(" the\n\n") == [257, 258]
    assert load_tokenizer(ASSETS / "20B_tokenizer.json").vocab_size == 50277


def test_unknown_tokenizers_are_refused(folder):
    with pytest.raises(BadTokenizer, match=r"no tokenizer 'wrld': it is neither world, 20b, bytes nor"):
        load_tokenizer("wrld")
    with pytest.raises(BadTokenizer, match=r"has no tokenizer; looked for tokenizer.json, vocab.txt"):
        load_tokenizer(folder)


def test_gguf_lists_are_unescaped():
    tokens = ["<s>", r"\x00", r"\n", "a", r"\\", r"\'", r"\xe4\xbd\xa0", "é", "[PAD8]", "[PAD9]"]
    tokenizer = from_gguf_tokens(tokens)
    pieces = {1: b"\0", 2: b"\n", 3: b"a", 4: b"\\", 5: b"'", 6: "你".encode(), 7: "é".encode()}
    assert tokenizer.pieces == pieces
    metadata = {"tokenizer.ggml.model": "rwkv", "tokenizer.ggml.tokens": tokens}
    assert resolve(vocab_size=10, metadata=metadata).pieces == pieces
    assert resolve(vocab_size=65536, metadata=metadata).name == "world"


def test_gguf_form_of_the_world_vocabulary_is_the_world_vocabulary():
    world = load_tokenizer("world")
    escaped = ["<s>", *(repr(piece)[2:-1] for piece in world.pieces.values())]
    assert from_gguf_tokens(escaped).pieces == world.pieces


@pytest.mark.parametrize("name", ["../vocab.txt", "/etc/passwd", "a/b.txt", "..", "a\\b"])
def test_metadata_name_a_file_beside_the_model_and_nothing_else(tmp_path, name):
    with pytest.raises(BadTokenizer, match="which is no plain file name"):
        resolve(vocab_size=300, path=tmp_path, metadata={"tokenizer": name})


def test_a_prompt_of_a_pile_model_ends_in_two_single_line_ends():
    from rookery.tokenizers.pairing import prompt_ids

    neox = load_tokenizer("20b")
    assert neox.encode("Bob: hi\n\n")[-1] == 535
    assert prompt_ids(neox, "Bob: hi\n\n") == [*neox.encode("Bob: hi"), 187, 187]
    assert prompt_ids(neox, "a\n\nb") == neox.encode("a\n\nb")
    assert prompt_ids(neox, "") == []
    assert prompt_ids(load_tokenizer("world"), "a\n\n") == load_tokenizer("world").encode("a\n\n")
