"""The World vocabulary as a tokenizer of transformers; `rookery.hf.register()` tells AutoTokenizer of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from rookery.tokenizers.pairing import load_tokenizer

END = "<|endoftext|>"
"""How id 0, which has no text of its own, is written."""
FILE = "rwkv_vocab_v20230424.txt"


class RookeryTokenizer(PreTrainedTokenizer):
    """Longest match over byte strings; a token is written as the Latin-1 letters of its bytes. Pads on the left."""

    vocab_files_names = {"vocab_file": FILE}  # noqa: RUF012 (transformers' own form)
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(self, vocab_file: str | os.PathLike[str] | None = None, **others: Any) -> None:
        self.trie = load_tokenizer("world" if vocab_file is None else vocab_file)
        self.ids = {piece.decode("latin-1"): index for index, piece in self.trie.pieces.items()}
        ends = {"bos_token": END, "eos_token": END, "pad_token": END}
        super().__init__(**{**ends, "padding_side": "left", "clean_up_tokenization_spaces": False, **others})

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], *args: Any, **others: Any) -> Any:
        """The tokenizer of a folder: its vocabulary file, its tokenizer.json, else World."""
        folder = Path(pretrained_model_name_or_path)
        if (folder / "tokenizer.json").is_file():
            fast = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), padding_side="left")
            fast.eos_token = fast.pad_token = fast.convert_ids_to_tokens(
                load_tokenizer(folder / "tokenizer.json").eos_id
            )
            return fast
        own = next((folder / name for name in (FILE, "vocab.txt") if (folder / name).is_file()), None)
        return cls(own)

    @property
    def vocab_size(self) -> int:
        return self.trie.vocab_size

    def get_vocab(self) -> dict[str, int]:
        return {END: 0, **self.ids, **self.added_tokens_encoder}

    def _tokenize(self, text: str, **others: Any) -> list[str]:
        return [self.trie.token_bytes(index).decode("latin-1") for index in self.trie.encode(text)]

    def _convert_token_to_id(self, token: str) -> int:
        return 0 if token == END else self.ids[token]

    def _convert_id_to_token(self, index: int) -> str:
        return END if index == 0 else self.trie.pieces[index].decode("latin-1")

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return b"".join(token.encode("latin-1") for token in tokens).decode("utf-8", "replace")

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        path = Path(save_directory) / f"{filename_prefix + '-' if filename_prefix else ''}{FILE}"
        self.trie.save(path)
        return (str(path),)
