"""Texts that must have a form: a JSON schema, a regular expression or a grammar, through llguidance.

At every step the tokens that would leave the form get no chance; what is left keeps its proportions.
(github.com/guidance-ai/llguidance)
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rookery.errors import MissingDependency

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

    from rookery.tokenizers import Tokenizer

SPACE = r"\n? {0,24}"
"""Between the parts of JSON: compact or indented, but never without an end, where weak models would stay for ever."""


@dataclass(frozen=True)
class Grammar:
    """The form of a text; made by `json_schema`, `regex`, `lark` or `gbnf`."""

    source: str
    """In llguidance's own notation."""
    what: str
    """What it was made from, for messages."""


def json_schema(schema: Mapping[str, Any] | bool | str) -> Grammar:
    """JSON that this schema describes: a dictionary, or its text. ValueError where the text is no JSON."""
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except json.JSONDecodeError as error:
            raise ValueError(f"the JSON schema is no JSON: {error}") from None
    source = _matcher().grammar_from_json_schema(json.dumps(schema), defaults={"whitespace_pattern": SPACE})
    return Grammar(source, "JSON schema")


def json_or_text(schema: Mapping[str, Any]) -> Grammar:
    """JSON that this schema describes, in a block of code or not, or any text that does not begin like it."""
    described = json.dumps({**schema, "x-guidance": {"whitespace_pattern": SPACE}})
    return lark(
        f"start: call | TEXT\ncall: /\\s?(```json\\n)?/ %json {described} /(\\n```)?/\nTEXT: /\\s*[^\\s{{`](.|\\n)*/"
    )


def regex(pattern: str) -> Grammar:
    """Text that the regular expression (Rust's dialect, no look-around) matches from its beginning to its end."""
    return Grammar(_matcher().grammar_from_regex(pattern), "regular expression")


def lark(grammar: str) -> Grammar:
    """Text of a context-free grammar in Lark's notation; it begins with the rule `start`."""
    return Grammar(_matcher().grammar_from_lark(grammar), "grammar")


def gbnf(grammar: str) -> Grammar:
    """Text of a grammar in llama.cpp's notation, which begins with `root`. ValueError for what cannot be read."""
    _llguidance()
    from llguidance.gbnf_to_lark import gbnf_to_lark

    try:
        return lark(gbnf_to_lark(grammar))
    except Exception as error:  # it raises plain ones, too
        raise ValueError(f"the GBNF grammar cannot be read: {error}") from None


class Guide:
    """What llguidance knows of a tokenizer; made once for a model, in some tenths of a second for 65,536 tokens.

    `end` is the token that ends a text, `vocab_size` that of the model, which may be larger than the tokenizer's.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end: int) -> None:
        llguidance = _llguidance()
        self.vocab_size = vocab_size
        self.tokenizer: LLTokenizer = llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(_Vocabulary(tokenizer, vocab_size, end)), n_vocab=vocab_size, eos_token=end
        )

    def check(self, grammar: Grammar) -> None:
        """ValueError where the grammar makes no sense."""
        wrong, said = _matcher().validate_grammar_with_warnings(grammar.source, self.tokenizer)
        if wrong:
            raise ValueError(f"the {grammar.what} cannot be used: {' '.join(' '.join(said).split())}")

    def start(self, grammar: Grammar) -> Constraint:
        """The beginning of a text."""
        return Constraint(_matcher()(self.tokenizer, grammar.source, log_level=0), self.vocab_size, grammar.what)


class Constraint:
    """Where a text stands in its grammar."""

    def __init__(self, matcher: LLMatcher, vocab_size: int, what: str = "grammar") -> None:
        self._matcher, self._vocab_size, self._what = matcher, vocab_size, what
        self._bits = np.zeros((vocab_size + 31) // 32, np.int32)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            # what follows are its inner counters
            said, _, _ = self._matcher.get_error().partition("<state>")
            raise ValueError(f"the {self._what} cannot be followed: {' '.join(said.split())}")

    def allowed(self) -> np.ndarray:
        """bool [vocab]: the tokens that may come next, the end of the text among them where it may end."""
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        self._check()
        return np.unpackbits(self._bits.view(np.uint8), bitorder="little")[: self._vocab_size].view(bool)

    def accept(self, token: int) -> None:
        """Goes on by a token that was allowed."""
        self._matcher.consume_token(token)
        self._check()

    @property
    def complete(self) -> bool:
        """True if nothing can follow."""
        return self._matcher.is_stopped()

    def copy(self) -> Constraint:
        """An independent copy."""
        return Constraint(self._matcher.deep_copy(), self._vocab_size, self._what)


class _Vocabulary:
    """A tokenizer as llguidance wants it."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end: int) -> None:
        self.eos_token_id, self._tokenizer = end, tokenizer
        known = min(vocab_size, tokenizer.vocab_size)
        # rows of the model that are no token have no bytes and are never allowed
        self.tokens = [tokenizer.token_bytes(i) for i in range(known)] + [b""] * (vocab_size - known)
        self.tokens[end] = b""
        self.special_token_ids = [i for i, piece in enumerate(self.tokens) if not piece]

    def __call__(self, text: str | bytes) -> list[int]:
        return self._tokenizer.encode(text)


def read_grammar(
    schema: str | os.PathLike[str] | None = None,
    pattern: str | None = None,
    grammar: str | os.PathLike[str] | None = None,
) -> Grammar | None:
    """The one that is given: the file of a schema, a regular expression, the file of a grammar; else None.

    A grammar's file is in llama.cpp's notation where its name ends in .gbnf, else in Lark's.
    """
    given = [name for name, value in (("schema", schema), ("pattern", pattern), ("grammar", grammar)) if value]
    if len(given) > 1:
        raise ValueError(f"a text can have one form, got {' and '.join(given)}")
    if schema:
        return json_schema(_text_of(schema))
    if grammar:
        return (gbnf if os.fspath(grammar).lower().endswith(".gbnf") else lark)(_text_of(grammar))
    return regex(pattern) if pattern else None


def _text_of(path: str | os.PathLike[str]) -> str:
    with open(path, encoding="utf-8") as file:
        return file.read()


def _llguidance() -> Any:
    try:
        import llguidance  # 30 ms, and most texts are free
    except ImportError as error:
        raise MissingDependency(f"texts of a given form need llguidance ({error}): pip install llguidance") from None
    return llguidance


def _matcher() -> Any:
    return _llguidance().LLMatcher
