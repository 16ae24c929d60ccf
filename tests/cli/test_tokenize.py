import json

import pytest


@pytest.mark.parametrize("where", [["--tokenizer", "bytes"], ["--model"]])
def test_tokens_are_shown(cli, model_path, where):
    where = [*where, model_path] if where == ["--model"] else where
    code, out, _ = cli("tokenize", *where, "hé")
    assert code == 0
    assert out.splitlines() == ["   104  'h'", r"   195  b'\xc3'", r"   169  b'\xa9'"]


def test_tokens_are_counted_and_listed(cli):
    assert cli("tokenize", "--tokenizer", "bytes", "--count", "abc")[1] == "3\n"
    assert cli("tokenize", "--tokenizer", "bytes", "--ids", "abc")[1] == "97 98 99\n"
    assert cli("tokenize", "--tokenizer", "bytes", "--count", stdin=b"abc\n")[1] == "3\n"


def test_json_tells_ids_and_pieces(cli):
    out = cli("tokenize", "--tokenizer", "world", "--json", "Hello world")[1]
    told = json.loads(out)
    assert (told["tokenizer"], told["count"], told["pieces"]) == ("world", len(told["ids"]), ["Hello", " world"])
