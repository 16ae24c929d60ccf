"""Byte-level BPE vocabularies in GGUF files, llama.cpp's tokenizer model "gpt2": to and from `tokenizer.json`.

A file has the tokens by id, their types, the merges, and the name of the rule that cuts a text before anything merges.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rookery.errors import BadTokenizer
from rookery.tokenizers.huggingface import HuggingFaceTokenizer

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""Types of tokens in GGUF."""
_START = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CUTS = {"qwen2": _START + r"\p{N}" + _REST, "llama-bpe": _START + r"\p{N}{1,3}" + _REST, "gpt-2": None}
"""llama.cpp's name of a rule -> its pattern; None for GPT-2's, which is built into the `tokenizers` package."""


def to_gguf(tokenizer: HuggingFaceTokenizer, vocab_size: int) -> dict[str, Any] | None:
    """Tokens, types, merges, rule and end of a `tokenizer.json`; None where llama.cpp has no such kind."""
    described = json.loads(tokenizer.to_json())
    model, cut = described.get("model", {}), _cut_of(described.get("pre_tokenizer"))
    if model.get("type") != "BPE" or cut is None or model.get("byte_fallback"):
        return None
    texts: dict[int, tuple[str, int]] = {index: (text, NORMAL) for text, index in model["vocab"].items()}
    for added in described.get("added_tokens", []):
        texts[added["id"]] = (added["content"], CONTROL if added["special"] else USER_DEFINED)
    unused = [(f"[PAD{index}]", UNUSED) for index in range(vocab_size)]
    listed = [texts.get(index, unused[index]) for index in range(vocab_size)]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return {
        "tokens": [text for text, _ in listed],
        "types": [kind for _, kind in listed],
        "merges": merges,
        "pre": cut,
        "eos": tokenizer.eos_id,
    }


def from_gguf(metadata: Mapping[str, Any]) -> HuggingFaceTokenizer:
    """The tokenizer of a file's settings `tokenizer.ggml.*`; BadTokenizer for a rule that is not known."""
    cut = metadata.get("tokenizer.ggml.pre", "gpt-2")
    if cut not in CUTS:
        raise BadTokenizer(
            f"the GGUF file's tokenizer cuts texts by the rule {str(cut)[:60]!r}, known are {', '.join(CUTS)}; name "
            "the model's tokenizer.json with --tokenizer."
        )
    tokens = [_text(token) for token in metadata["tokenizer.ggml.tokens"]]
    types = metadata.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    vocab = {text: index for index, (text, kind) in enumerate(zip(tokens, types)) if kind == NORMAL}
    added = [
        _added(index, text, kind == CONTROL)
        for index, (text, kind) in enumerate(zip(tokens, types))
        if kind in (CONTROL, USER_DEFINED)
    ]
    model = {"type": "BPE", "vocab": vocab, "merges": [_text(merge) for merge in metadata["tokenizer.ggml.merges"]]}
    described = {
        "version": "1.0",
        "added_tokens": added,
        "pre_tokenizer": _pre_tokenizer(CUTS[cut]),
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "model": model,
    }
    end = metadata.get("tokenizer.ggml.eos_token_id")
    return HuggingFaceTokenizer.from_json(
        json.dumps(described), "the GGUF file's vocabulary", int(end) if end is not None else None
    )


def _text(token: str | bytes) -> str:
    return token if isinstance(token, str) else token.decode("utf-8", "replace")


def _added(index: int, text: str, special: bool) -> dict[str, Any]:
    sides = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": index, "content": text, "special": special, **sides}


def _pre_tokenizer(pattern: str | None) -> dict[str, Any]:
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": pattern is None}
    if pattern is None:
        return level
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, level]}


def _cut_of(described: Any) -> str | None:
    """llama.cpp's name for what cuts a text; None for a rule that it does not have."""
    steps: Sequence[Any] = (described or {}).get("pretokenizers", [described])
    level = next((step for step in steps if step and step.get("type") == "ByteLevel"), None)
    if level is None or level.get("add_prefix_space"):
        return None
    patterns = [step["pattern"].get("Regex") for step in steps if step.get("type") == "Split"]
    if not patterns:
        return "gpt-2" if len(steps) == 1 and level.get("use_regex", True) else None
    return next((name for name, known in CUTS.items() if patterns == [known]), None)
