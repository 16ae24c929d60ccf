import gzip
import json
import math
import tarfile
import zipfile

import pytest
import torch
from support.data import shared

from rookery.evaluate.benchmarks import (
    _mmlu_questions,
    blimp,
    encode_pair,
    lambada,
    mmlu,
    mmlu_prompt,
    multiple_choice,
)
from rookery.evaluate.needle import passkey, passkey_request
from rookery.evaluate.scoring import Request, Score, Scorer
from rookery.models import create_model
from rookery.tokenizers import load_tokenizer

BYTES, WORLD = load_tokenizer("bytes"), load_tokenizer("world")


class Believer:
    """Stands in for a Scorer: a target is as likely as `believe` says of the whole text."""

    def __init__(self, believe, tokenizer=WORLD):
        self.believe, self.tokenizer, self.seen = believe, tokenizer, []

    def score(self, requests, *, first=False):
        self.seen += requests
        return [self._score(request) for request in requests]

    def _score(self, request):
        context, target = (self.tokenizer.decode(part) for part in request)
        value = self.believe(context, target)
        distribution = torch.zeros(self.tokenizer.vocab_size)
        if isinstance(value, str):
            distribution[self.tokenizer.encode(value)[0]] = 1.0
            value = 0.0
        return Score(float(value), value > -1, distribution)


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def test_lambada_asks_for_the_last_word_with_its_space(tmp_path):
    path = write(tmp_path / "l.jsonl", [{"text": "one two\nthree four"}, {"text": "five six"}])
    scorer = Believer(lambda context, target: -0.5 if target == " four" else -2.0)
    found = lambada(scorer, WORLD, path)
    assert found == {"accuracy": 0.5, "perplexity": pytest.approx(math.exp(1.25)), "questions": 2}
    assert scorer.seen[0] == Request([0, *WORLD.encode("one two\nthree")], WORLD.encode(" four"))
    assert lambada(scorer, WORLD, path, limit=1)["accuracy"] == 1.0


@pytest.mark.data
def test_the_published_lambada_splits_as_documented():
    scorer = Believer(lambda context, target: 0.0)
    lambada(scorer, WORLD, shared("eval/lambada_test.jsonl"))
    assert len(scorer.seen) == 5153
    assert sum(len(request.context) for request in scorer.seen) == 406_892
    assert sum(len(request.target) for request in scorer.seen) == 6_918
    assert [list(request.target) for request in scorer.seen[:3]] == [[39686], [37336], [59888]]
    assert [len(request.context) for request in scorer.seen[:3]] == [88, 66, 102]


QUESTIONS = [
    {"subject": "high_school_biology", "question": "Q1?", "choices": ["a", "b", "c", "d"], "answer": 1},
    {"subject": "high_school_biology", "question": "Q2?", "choices": ["a", "b", "c", "d"], "answer": 2},
    {"subject": "law", "question": "Q3?", "choices": ["a", "b", "c", "d"], "answer": 3},
]


def test_mmlu_compares_the_four_letters(tmp_path):
    found = mmlu(
        Believer(lambda context, target: " B" if "Q1" in context else " D"),
        WORLD,
        write(tmp_path / "m.jsonl", QUESTIONS),
    )
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["subjects"] == {"high_school_biology": 0.5, "law": 1.0}


def test_the_mmlu_prompt_is_the_official_one():
    assert mmlu_prompt(QUESTIONS[0]) == (
        "User: You are a very talented expert in high school biology. Answer this question:\n"
        "Q1?\nA. a\nB. b\nC. c\nD. d\n\nAssistant: The answer is"
    )
    assert [WORLD.encode(letter) for letter in (" A", " B", " C", " D")] == [[300], [301], [302], [303]]


def test_mmlu_needs_letters_that_are_tokens(tmp_path):
    with pytest.raises(ValueError, match="tokenizer 'bytes' cuts these in pieces"):
        mmlu(Believer(lambda context, target: 0.0), BYTES, write(tmp_path / "m.jsonl", QUESTIONS))


@pytest.mark.data
def test_the_published_mmlu_has_all_its_questions():
    pytest.importorskip("pyarrow")
    questions = list(_mmlu_questions(shared("eval/mmlu.tar")))
    assert len(questions) == 14_042
    assert len({question["subject"] for question in questions}) == 57
    assert {question["answer"] for question in questions} == {0, 1, 2, 3}


def choices(doc, context, options, label):
    return [
        {"doc_id": doc, "label": label, "request": {"context": context, "continuation": option}} for option in options
    ]


def test_multiple_choice_takes_the_likeliest(tmp_path):
    records = choices(0, "Q: x\nA:", [" good", " bad and long"], 0) + choices(1, "Q: y\nA:", [" bad", " good"], 0)
    path = tmp_path / "r.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    scorer = Believer(lambda context, target: {" good": -2.0, " bad": -3.0}.get(target, -5.0))
    found = multiple_choice(scorer, WORLD, path)
    assert found == {"accuracy": 0.5, "accuracy_per_character": 0.0, "questions": 2}
    assert multiple_choice(scorer, WORLD, path, limit=1)["questions"] == 1


def test_a_pair_is_cut_where_the_context_ends():
    assert encode_pair(BYTES, "Q: ", "yes") == Request([0, *BYTES.encode("Q:")], BYTES.encode(" yes"))
    joined = encode_pair(WORLD, "An", "swer")  # "Answer" is one token
    assert joined == Request([0, *WORLD.encode("An")], WORLD.encode("swer"))


@pytest.mark.data
@pytest.mark.parametrize("task", ["arc_easy.rc_0shot", "winogrande.rc_0shot", "copa.rc_0shot"])
def test_published_requests_are_read(task):
    scorer = Believer(lambda context, target: -len(target))
    found = multiple_choice(scorer, BYTES, shared(f"eval/requests/{task}.jsonl.gz"), limit=20)
    assert found["questions"] == 20


def test_blimp_prefers_the_grammatical_sentence(tmp_path):
    pairs = [
        {"sentence_good": "Who sleeps?", "sentence_bad": "Who sleep?"},
        {"sentence_good": "b", "sentence_bad": "cc"},
    ]
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.writestr("data/agreement.jsonl", "\n".join(map(json.dumps, pairs)))
        archive.writestr("data/island.jsonl", json.dumps(pairs[1]))
    found = blimp(Believer(lambda context, target: -len(target)), WORLD, tmp_path / "b.zip")
    assert found["paradigms"] == {"agreement": 0.5, "island": 1.0}
    assert found["accuracy"] == pytest.approx(2 / 3)


def test_passkeys_are_placed_by_length_and_depth():
    for depth in (0.0, 0.5, 1.0):
        request = passkey_request(WORLD, 400, depth, 12345)
        text = WORLD.decode(request.context)
        assert 370 < len(request.context) <= 400
        assert text.count("12345") == 2
        assert text.index("12345") / len(text) == pytest.approx(0.08 + 0.8 * depth, abs=0.1)
        assert WORLD.decode(request.target) == " 12345"
    with pytest.raises(ValueError, match="has no room for the needle; give at least"):
        passkey_request(WORLD, 20, 0.5, 12345)


def test_a_model_that_remembers_short_texts_only_gets_those():
    scorer = Believer(lambda context, target: 0.0 if len(context) < 1500 else -9.0)
    found = passkey(scorer, WORLD, lengths=(256, 1024), depths=(0.0, 1.0), trials=2)
    assert [row["accuracy"] for row in found["table"]] == [1.0, 1.0, 0.0, 0.0]
    assert (found["accuracy"], found["questions"]) == (0.5, 8)


def test_a_real_model_goes_through_all_of_them(tmp_path):
    pieces = [*(bytes([i]) for i in range(256)), b" A", b" B", b" C", b" D"]
    (tmp_path / "vocab.txt").write_text("".join(f"{i} {piece!r} {len(piece)}\n" for i, piece in enumerate(pieces, 1)))
    tokenizer = load_tokenizer(tmp_path / "vocab.txt")
    scorer = Scorer(create_model("rwkv7-test", vocab_size=261).eval())
    assert mmlu(scorer, tokenizer, write(tmp_path / "m.jsonl", QUESTIONS))["questions"] == 3
    assert lambada(scorer, tokenizer, write(tmp_path / "l.jsonl", [{"text": "one two"}]))["questions"] == 1
    found = passkey(scorer, tokenizer, lengths=(400,), depths=(0.5,), trials=3)
    assert found["questions"] == 3
    assert scorer.tokens_read < scorer.tokens_asked


@pytest.mark.parametrize("task", [lambada, mmlu, multiple_choice, blimp])
def test_wrong_files_are_named(task, tmp_path):
    scorer = Believer(lambda context, target: 0.0)
    path = tmp_path / "x.jsonl"
    with pytest.raises(FileNotFoundError, match="there is no file"):
        task(scorer, WORLD, path)
    path.write_text("{}\n")
    with pytest.raises((ValueError, KeyError)):
        task(scorer, WORLD, path)
    path.write_text("nonsense\n")
    with pytest.raises(ValueError, match="line 1: not JSON"):
        task(scorer, WORLD, path)
    path.write_text("")
    with pytest.raises(ValueError, match="there are no (questions|texts) in"):
        task(scorer, WORLD, path)


def test_a_tar_of_arrow_files_is_read(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    rows = pyarrow.Table.from_pylist([{k: v for k, v in QUESTIONS[0].items() if k != "subject"}])
    with pyarrow.OSFile(str(tmp_path / "x.arrow"), "wb") as sink, pyarrow.ipc.new_stream(sink, rows.schema) as writer:
        writer.write_table(rows)
    with tarfile.open(tmp_path / "m.tar", "w") as archive:
        for split in ("test", "dev"):
            archive.add(tmp_path / "x.arrow", f"mmlu/high_school_biology/{split}/data.arrow")
    assert list(_mmlu_questions(tmp_path / "m.tar")) == [QUESTIONS[0]]
