"""Byte-level BPE in GGUF: a tokenizer.json goes in and comes out, and texts have the same tokens."""

import gguf
import pytest
import torch
from support.language import randomised

from rookery.checkpoints.convert import convert
from rookery.engine.llm import LLM
from rookery.errors import BadTokenizer
from rookery.models import save_model
from rookery.tokenizers.gguf_bpe import CUTS, from_gguf, to_gguf
from rookery.tokenizers.huggingface import HuggingFaceTokenizer
from rookery.tokenizers.pairing import load_tokenizer

TEXTS = ["Hello, world! It's 12345 o'clock.\n\n  a\tb", "你好 😀 été", "x" * 40, " \n \n", "<|end|>?", ""]


def small(cut, path=None):
    """A byte-level BPE with two added tokens, one of them special."""
    tokenizers = pytest.importorskip("tokenizers")
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

    made = tokenizers.Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=CUTS[cut] is None)
    split = [] if CUTS[cut] is None else [pre_tokenizers.Split(Regex(CUTS[cut]), "isolated")]
    made.pre_tokenizer = pre_tokenizers.Sequence([*split, level]) if split else level
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(["hello world hello there 123 it's wor wor\n\n"] * 9, trainer)
    made.add_special_tokens(["<|endoftext|>"])
    made.add_tokens(["<|end|>"])
    if path:
        made.save(str(path))
    return HuggingFaceTokenizer.from_json(made.to_str(), cut)


@pytest.mark.parametrize("cut", CUTS)
def test_a_vocabulary_comes_back_with_the_same_tokens(cut):
    tokenizer = small(cut)
    listed = to_gguf(tokenizer, 400)
    assert (listed["pre"], listed["eos"], len(listed["tokens"])) == (cut, tokenizer.eos_id, 400)
    assert listed["types"][tokenizer.eos_id] == 3
    assert (listed["tokens"][-1], listed["types"][-1]) == ("[PAD399]", 5)
    named = {"tokens": listed["tokens"], "token_type": listed["types"], "merges": listed["merges"], "pre": cut}
    back = from_gguf({f"tokenizer.ggml.{key}": value for key, value in named.items()})
    assert back.eos_id == tokenizer.eos_id
    for text in TEXTS:
        assert back.encode(text) == tokenizer.encode(text)
        assert back.decode(back.encode(text)) == tokenizer.decode(tokenizer.encode(text)) == text


def test_the_20b_tokenizer_has_its_tokens_in_gguf():
    neox = load_tokenizer("20b")
    listed = to_gguf(neox, 50277)
    assert (listed["pre"], listed["tokens"][0], listed["types"][0]) == ("gpt-2", "<|endoftext|>", 3)
    named = {"tokens": listed["tokens"], "token_type": listed["types"], "merges": listed["merges"]}
    back = from_gguf({f"tokenizer.ggml.{key}": value for key, value in named.items()})
    for text in TEXTS:
        assert back.encode(text) == neox.encode(text)


def test_other_kinds_are_left_to_a_file_beside():
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    assert to_gguf(HuggingFaceTokenizer.from_json(words.to_str(), "words"), 2) is None
    odd = small("qwen2").to_json().replace("{N}|", "{N}{1,2}|")
    assert to_gguf(HuggingFaceTokenizer.from_json(odd, "odd"), 400) is None


def test_an_unknown_rule_is_refused_with_the_remedy():
    with pytest.raises(BadTokenizer, match="cuts texts by the rule 'tekken', known are qwen2.*with --tokenizer"):
        from_gguf({"tokenizer.ggml.pre": "tekken", "tokenizer.ggml.tokens": [], "tokenizer.ggml.merges": []})


@pytest.mark.parametrize("ours", [True, False])
def test_a_converted_transformer_brings_its_tokenizer_and_its_end(tmp_path, ours):
    (tmp_path / "source").mkdir()
    tokenizer = small("qwen2", tmp_path / "source" / "tokenizer.json")
    model = randomised("arwkv-test", dtype=torch.float32, vocab_size=352, gate="none")
    save_model(model, tmp_path / "source" / "model.safetensors")
    convert(tmp_path / "source", tmp_path / "m.gguf")
    if not ours:  # another program's file has no metadata of ours
        whole = (tmp_path / "m.gguf").read_bytes()
        (tmp_path / "m.gguf").write_bytes(whole.replace(b"rookery.metadata", b"nobody's.metadat"))
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    assert fields["tokenizer.ggml.model"].contents() == "gpt2"
    llm = LLM(tmp_path / "m.gguf")
    assert llm.tokens_of("hello there 123") == tokenizer.encode("hello there 123")
    assert llm.end_of_text == tokenizer.eos_id != 0
    unused = tuple(range(tokenizer.vocab_size, 352))
    assert len(llm.generate("hello", 5, seed=1, ignore_eos=True, banned=unused)) > 0
