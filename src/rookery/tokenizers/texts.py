"""Texts as the text tower of RWKV-CLIP reads them: begun, ended, cut to its length and filled up."""

import gzip
import html
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from rookery.errors import BadTokenizer
from rookery.tokenizers.byte_level import byte_letters
from rookery.tokenizers.huggingface import HuggingFaceTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
MERGES = 49152 - 256 - 2
"""Merges of CLIP's file that count; it has more."""
WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
"""What CLIP takes for a word."""


class TextInput:
    """Texts to rows of token ids, as a model with `vocab_size` tokens and `context_length` positions wants them.

    The last id but one begins a text, the last one ends it, 0 fills it up. A text that is too long is cut before its
    end, which stays.
    """

    def __init__(self, tokenizer: HuggingFaceTokenizer, vocab_size: int, context_length: int) -> None:
        """BadTokenizer where the tokenizer has ids that the model has not."""
        if tokenizer.vocab_size > vocab_size:
            raise BadTokenizer(
                f"the tokenizer {tokenizer.name!r} has {tokenizer.vocab_size} tokens, the model only {vocab_size}"
            )
        self.tokenizer, self.vocab_size, self.context_length = tokenizer, vocab_size, context_length

    def __call__(self, texts: str | Sequence[str]) -> np.ndarray:
        """int64 [texts, context_length]"""
        texts = [texts] if isinstance(texts, str) else texts
        rows = np.zeros((len(texts), self.context_length), np.int64)
        for row, text in zip(rows, texts):
            ids = self.tokenizer.encode(cleaned(text))[: self.context_length - 2]
            ids = [self.vocab_size - 2, *ids, self.vocab_size - 1]
            row[: len(ids)] = ids
        return rows


def cleaned(text: str) -> str:
    """The text without the escapes of web pages (once or twice escaped), white space made single."""
    return " ".join(html.unescape(html.unescape(text)).split())


def clip_tokenizer(path: str | os.PathLike[str]) -> HuggingFaceTokenizer:
    """CLIP's tokenizer from `bpe_simple_vocab_16e6.txt(.gz)`, or any `tokenizer.json`. BadTokenizer for other files."""
    path = Path(path)
    if path.suffix == ".json":
        return HuggingFaceTokenizer(path)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise BadTokenizer(f"cannot read the tokenizer {str(path)!r}: {error.strerror}.") from error
    try:
        text = (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise BadTokenizer(f"{str(path)!r} is damaged ({error}); fetch it again.") from None
    merges = [tuple(line.split()) for line in text.split("\n")[1 : MERGES + 1]]
    if len(merges) < MERGES or any(len(merge) != 2 for merge in merges):
        raise BadTokenizer(
            f"{str(path)!r} is not CLIP's list of {MERGES} merges: two tokens a line after a first line."
        )
    return from_merges(merges)


def from_merges(merges: Sequence[tuple[str, str]], vocabulary: dict[str, int] | None = None) -> HuggingFaceTokenizer:
    """The tokenizer of these merges, in their order; ids follow it as CLIP's do, unless `vocabulary` says them."""
    if vocabulary is None:
        letters = sorted(byte_letters())  # in the order of their code points
        tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(merge) for merge in merges), START, END]
        vocabulary = {token: i for i, token in enumerate(tokens)}
    model = {"type": "BPE", "vocab": vocabulary, "merges": [list(m) for m in merges], "end_of_word_suffix": "</w>"}
    split = {"type": "Split", "pattern": {"Regex": WORDS}, "behavior": "Removed", "invert": True}
    letters = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return _tokenizer(model, {"type": "Sequence", "pretokenizers": [split, letters]}, "clip")


def word_tokenizer(texts: Iterable[str], limit: int | None = None) -> HuggingFaceTokenizer:
    """A vocabulary of the words of `texts`, the most frequent first; 0 stands for every other word."""
    words = Counter(word for text in texts for word in re.findall(r"\w+|[^\w\s]", cleaned(text).lower()))
    kept = [word for word, _ in sorted(words.items(), key=lambda item: (-item[1], item[0]))][:limit]
    if not kept:
        raise BadTokenizer("there is no word in these texts to make a vocabulary of")
    vocabulary = {"<other>": 0, **{word: i for i, word in enumerate(kept, 1)}}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<other>"}
    split = {"type": "Split", "pattern": {"Regex": r"\w+|[^\w\s]"}, "behavior": "Removed", "invert": True}
    return _tokenizer(model, split, "words")


def _tokenizer(model: dict, pre_tokenizer: dict, name: str) -> HuggingFaceTokenizer:
    normalizer = {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}
    parts = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": normalizer}
    parts |= {"pre_tokenizer": pre_tokenizer, "post_processor": None, "decoder": None, "model": model}
    return HuggingFaceTokenizer.from_json(json.dumps(parts, ensure_ascii=False), name, eos_id=0)
