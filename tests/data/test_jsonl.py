import json

import numpy as np
import pytest
from support.data import shared

from rookery.data.jsonl import encode, messages_of, parts_of, read_preferences, read_samples
from rookery.tokenizers import load_tokenizer

BYTES = load_tokenizer("bytes")
TURNS = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
FORMS = [
    {"instruction": "2+2?", "input": "", "output": "4"},
    {"question": "2+2?", "answer": "4"},
    {"prompt": "2+2?", "response": "4"},
    {"messages": TURNS},
    {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]},
]


@pytest.mark.parametrize("record", FORMS, ids=lambda record: "+".join(record))
def test_every_form_of_a_conversation_gives_the_same_turns(record):
    assert messages_of(record) == TURNS


def learned_text(sample):
    return BYTES.decode_bytes(sample.tokens[sample.learned])


def test_only_answers_and_their_ends_are_learned():
    more = [*TURNS, {"role": "user", "content": "and 3+3?"}, {"role": "assistant", "content": "6"}]
    sample = encode(parts_of({"messages": more}, "g1"), BYTES)
    assert BYTES.decode(sample.tokens) == "User: 2+2?\n\nAssistant: 4\n\nUser: and 3+3?\n\nAssistant: 6"
    assert learned_text(sample) == b" 4\n\n 6"
    assert sample.tokens[-1] == 0
    assert sample.learned[-1]


def test_the_mask_none_learns_everything_but_the_first_token():
    sample = encode(parts_of({"messages": TURNS}, "g1", "none"), BYTES)
    assert sample.learned.tolist() == [False] + [True] * (len(sample.tokens) - 1)


def test_the_mask_qa_finds_the_answers_in_a_text():
    text = "User: say Assistant: twice\n\nAssistant: Assistant:\n\nno speaker here\n\nUser: bye\n\nAssistant: bye"
    sample = encode(parts_of({"text": text}, "g1", "qa"), BYTES)
    assert learned_text(sample) == b" Assistant:\n\nno speaker here\n\n bye"
    assert encode(parts_of({"text": text}, "g1"), BYTES).learned[1:].all()


def test_a_token_across_the_border_belongs_to_the_answer(tmp_path):
    pieces = ["a", ":", " ", "b", ": b", "c"]
    lines = [f"{i} {piece!r} {len(piece)}\n" for i, piece in enumerate(pieces, 1)]
    (tmp_path / "vocab.txt").write_text("".join(lines))
    sample = encode([("a:", False), (" bc", True)], load_tokenizer(tmp_path / "vocab.txt"))
    assert sample.tokens.tolist() == [1, 5, 6, 0]
    assert sample.learned.tolist() == [False, True, True, True]


def test_a_tokenizer_that_changes_the_text_is_given_the_pieces():
    tokenizer = load_tokenizer("20b")
    sample = encode([("e\u0301:", False), (" ok", True)], tokenizer)  # normalised to one character
    assert tokenizer.decode(sample.tokens[sample.learned]) == " ok"


def write(path, records):
    path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    return str(path)


def test_a_bad_record_is_named_by_its_line(tmp_path):
    path = write(tmp_path / "x.jsonl", [{"text": "fine"}, {"tekst": "?"}])
    with pytest.raises(ValueError, match=r"x.jsonl, line 2: a record with the keys tekst is of no known form"):
        read_samples(path, BYTES, "g1")
    with pytest.raises(ValueError, match="a turn needs a role and a text, got the keys who"):
        read_samples(write(tmp_path / "y.jsonl", [{"messages": [{"who": 1}]}]), BYTES, "g1")
    with pytest.raises(ValueError, match='needs a message of the role "assistant"'):
        read_samples(write(tmp_path / "z.jsonl", [{"messages": TURNS[:1]}]), BYTES, "g1")
    (tmp_path / "broken.jsonl").write_text("{")
    with pytest.raises(ValueError, match="broken.jsonl, line 1: not JSON"):
        read_samples(str(tmp_path / "broken.jsonl"), BYTES, "g1")
    (tmp_path / "object.json").write_text("{}")
    with pytest.raises(ValueError, match="object.json holds one dict, expected a list of records"):
        read_samples(str(tmp_path / "object.json"), BYTES, "g1")
    with pytest.raises(ValueError, match="expected a JSON object, got int"):
        read_samples(write(tmp_path / "n.jsonl", [3]), BYTES, "g1")
    with pytest.raises(FileNotFoundError, match="there is no data file 'nothing.jsonl'"):
        read_samples("nothing.jsonl", BYTES, "g1")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="there are no records in"):
        read_samples(str(tmp_path / "empty.jsonl"), BYTES, "g1")


def test_tables_hold_conversations_too(tmp_path, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist([{"messages": TURNS}] * 2), tmp_path / "x.parquet")
    assert [learned_text(s) for s in read_samples(str(tmp_path / "x.parquet"), BYTES, "g1")] == [b" 4"] * 2
    monkeypatch.setattr("rookery.data.jsonl.dataset_rows", lambda name: iter([{"question": name, "answer": "4"}]))
    (sample,) = read_samples("hf:some/set:test", BYTES, "g1")
    assert "User: some/set:test" in BYTES.decode(sample.tokens)


PREFERENCES = [
    {"prompt": "hi", "chosen": "good", "rejected": "bad"},
    {"conversations": [{"from": "human", "value": "hi"}], "chosen": {"from": "gpt", "value": "good"},
     "rejected": {"from": "gpt", "value": "bad"}},
    {"chosen": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "good"}],
     "rejected": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "bad"}]},
]  # fmt: skip


@pytest.mark.parametrize("record", PREFERENCES, ids=["strings", "sharegpt", "conversations"])
def test_preferences_share_their_prompt(record, tmp_path):
    (pair,) = read_preferences(write(tmp_path / "p.jsonl", [record]), BYTES, "g1")
    assert [learned_text(sample) for sample in (pair.chosen, pair.rejected)] == [b" good", b" bad"]
    assert BYTES.decode(pair.chosen.tokens[~pair.chosen.learned]) == "User: hi\n\nAssistant:"


def test_a_preference_needs_both_answers(tmp_path):
    path = write(tmp_path / "p.jsonl", [{"prompt": "hi", "chosen": "good"}])
    with pytest.raises(ValueError, match='p.jsonl, line 1: a preference needs "chosen" and "rejected"'):
        read_preferences(path, BYTES, "g1")


@pytest.mark.data
def test_published_files_are_read():
    samples = read_samples(str(shared("finetune/alpaca_en_demo.json")), BYTES, "g1")
    assert len(samples) == 999
    assert all(s.learned.any() and not s.learned.all() for s in samples)
    assert len(read_samples(str(shared("finetune/gsm8k_test.jsonl")), BYTES, "g1")) == 1319
    pairs = read_preferences(str(shared("finetune/dpo_en_demo.json")), BYTES, "g1")
    assert len(pairs) == 300
    assert not np.array_equal(pairs[0].chosen.tokens, pairs[0].rejected.tokens)
