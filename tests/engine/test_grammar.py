import json
import re

import numpy as np
import pytest
import torch
from support.language import randomised

from rookery.engine.grammar import gbnf, json_schema, lark, read_grammar, regex
from rookery.engine.llm import LLM
from rookery.engine.scheduler import Scheduler
from rookery.models import save_model

SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["Ann", "Zoë"]}, "age": {"type": "integer", "minimum": 0, "maximum": 120}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    save_model(randomised("rwkv7-test", dtype=torch.float32, vocab_size=256), path)
    return LLM(path, threads=1)


@pytest.mark.parametrize("seed", range(5))
def test_the_text_is_json_of_the_schema(llm, seed):
    text = llm.generate("hello", 200, seed=seed, top_p=0.9, grammar=json_schema(SCHEMA))
    found = json.loads(text)
    assert found.keys() == {"name", "age"}
    assert found["name"] in SCHEMA["properties"]["name"]["enum"]
    assert 0 <= found["age"] <= 120


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_the_text_matches_the_expression_and_ends(llm, ignore_eos):
    session = llm.session()
    session.feed("hello")
    stream = session.stream(50, seed=1, grammar=regex(r"[a-c]{3}-[0-9]{2}"), ignore_eos=ignore_eos)
    assert re.fullmatch(r"[a-c]{3}-[0-9]{2}", "".join(stream))
    assert stream.finish_reason == "end"
    assert session.tokens_seen == 5 + 6


def test_a_grammar_is_followed(llm):
    grammar = lark('start: "(" start ")" | "x"')
    text = llm.generate("hello", 40, seed=2, top_p=1.0, grammar=grammar, stop=["never"])
    assert re.fullmatch(r"\(*x\)*", text)
    assert text.count("(") == text.count(")")


GBNF = r"""
# pairs in brackets
root ::= pair ("," ws pair){2}
pair ::= "(" [a-c]{1,3} ")" | "[" pair "]"
ws ::= " "?
"""


def test_a_grammar_of_llama_cpp_is_followed(llm):
    text = llm.generate("hello", 200, seed=2, top_p=1.0, grammar=gbnf(GBNF))
    assert text.count("[") == text.count("]")
    assert re.fullmatch(r"\[*\([a-c]{1,3}\)\]*(, ?\[*\([a-c]{1,3}\)\]*){2}", text)


def test_a_free_text_and_a_bound_one_in_one_batch(llm):
    scheduler = Scheduler(llm)
    grammar = regex("yes|no")
    bound = [scheduler.submit("hello", 20, seed=i, grammar=grammar) for i in range(3)]
    free = scheduler.submit("hello", 20, seed=1, ignore_eos=True)
    assert {text.text() for text in bound} <= {"yes", "no"}
    assert free.text() == llm.generate("hello", 20, seed=1, ignore_eos=True)
    assert bound[0].finish_reason == "end"


def test_guesses_obey_the_form_too(llm):
    grammar, options = regex("(ab, ){4}c"), {"seed": 3, "top_p": 1.0}
    assert llm.generate("ab, ab, ", 60, grammar=grammar, speculate=6, **options) == "ab, ab, ab, ab, c"


def test_only_allowed_tokens_have_a_chance(llm):
    constraint = llm.guide.start(regex("ab|ac"))
    assert np.flatnonzero(constraint.allowed()).tolist() == [ord("a")]
    constraint.accept(ord("a"))
    branch = constraint.copy()
    assert np.flatnonzero(constraint.allowed()).tolist() == [ord("b"), ord("c")]
    constraint.accept(ord("b"))
    assert constraint.complete
    assert not branch.complete
    with pytest.raises(ValueError, match="the regular expression cannot be followed"):
        branch.accept(ord("x"))


def test_a_large_vocabulary_has_rows_that_are_no_token():
    from rookery.engine.grammar import Guide
    from rookery.tokenizers import load_tokenizer

    guide = Guide(load_tokenizer("world"), 65536, 0)
    allowed = guide.start(regex("(hello|help) world")).allowed()
    assert allowed.shape == (65536,)
    assert not allowed[0]
    assert not allowed[65530:].any()
    assert {load_tokenizer("world").token_bytes(i) for i in np.flatnonzero(allowed)} >= {b"h", b"he", b"hello", b"help"}


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        (lambda: json_schema('{"type":'), "the JSON schema is no JSON"),
        (lambda: json_schema({"type": "nonsense"}), "the JSON schema cannot be used: .*nonsense"),
        (lambda: regex("("), "the regular expression cannot be used: .*unclosed group"),
        (lambda: lark("start: nothing"), "the grammar cannot be used: .*nothing"),
        (lambda: gbnf("root ::= nothing"), "the GBNF grammar cannot be read: .*nothing"),
        (lambda: gbnf("no grammar"), "the GBNF grammar cannot be read: "),
        (lambda: read_grammar(pattern="a", grammar="b"), "a text can have one form, got pattern and grammar"),
    ],
)
def test_forms_that_make_no_sense_are_refused(llm, grammar, message):
    with pytest.raises(ValueError, match=message):
        llm.generate("hello", 5, grammar=grammar())


def test_forms_come_from_files(tmp_path, llm):
    (tmp_path / "s.json").write_text(json.dumps(SCHEMA))
    (tmp_path / "g.lark").write_text('start: "x"')
    assert read_grammar() is None
    assert read_grammar(tmp_path / "s.json") == json_schema(SCHEMA)
    assert read_grammar(grammar=tmp_path / "g.lark") == lark('start: "x"')
    (tmp_path / "g.GBNF").write_text(GBNF)
    assert read_grammar(grammar=tmp_path / "g.GBNF") == gbnf(GBNF)
    assert read_grammar(pattern="a+") == regex("a+")
