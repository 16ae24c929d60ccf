import json

import pytest
import torch
from support.language import randomised

from rookery.engine.batch import run_batch
from rookery.engine.llm import LLM
from rookery.models import save_model

PROMPTS = [{"prompt": f"hello {i}", "id": f"p{i}"} for i in range(9)]


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    save_model(randomised("rwkv7-test", dtype=torch.float32, vocab_size=256), path)
    return LLM(path, threads=1, template="g1")


@pytest.fixture
def files(tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in PROMPTS))
    return source, tmp_path / "out.jsonl"


def results(path):
    return sorted((json.loads(line) for line in path.read_text().splitlines()), key=lambda line: line["index"])


def test_every_prompt_gets_its_text(llm, files):
    counts = list(run_batch(llm, *files, rows=4, max_tokens=10, seed=5))
    assert (counts[0], counts[-1], len(counts)) == ((0, 9), (9, 9), 10)
    for i, line in enumerate(results(files[1])):
        text = llm.generate(PROMPTS[i]["prompt"], 10, seed=5 + i)
        assert (line["index"], line["id"], line["text"], line["seed"]) == (i, f"p{i}", text, 5 + i)
        assert line["prompt_tokens"] == 7


@pytest.mark.parametrize("stop", range(0, 9, 2))
def test_an_interrupted_run_ends_with_the_same_texts(llm, files, stop, tmp_path):
    list(run_batch(llm, files[0], tmp_path / "whole", rows=3, max_tokens=8))
    for done, _ in run_batch(llm, *files, rows=3, max_tokens=8):
        if done == stop:
            break
    with files[1].open("ab") as file:
        file.write(b'{"index": 8, "te')  # half a line
    (first, *_) = run_batch(llm, *files, rows=3, max_tokens=8)
    assert first == (stop, 9)
    assert results(files[1]) == results(tmp_path / "whole")
    assert list(run_batch(llm, *files, rows=3, max_tokens=8)) == [(9, 9)]


def test_lines_may_have_their_own_options(llm, files):
    lines = [
        {"prompt": [1, 2, 3], "max_tokens": 3, "ignore_eos": True, "bos": True},
        {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, "seed": 77, "stop": "x"},
        {"prompt": "hello", "regex": "yes|no"},
        {"prompt": "hello", "json_schema": {"const": 1}},
    ]
    files[0].write_text("\n\n".join(map(json.dumps, lines)))
    list(run_batch(llm, *files, max_tokens=50))
    done = results(files[1])
    assert (done[0]["tokens"], done[0]["finish_reason"], done[0]["prompt_tokens"]) == (3, "length", 4)
    assert (done[1]["seed"], done[1]["prompt_tokens"]) == (77, len("User: hi\n\nAssistant:"))
    assert done[2]["text"] in ("yes", "no")
    assert json.loads(done[3]["text"]) == 1


def test_a_prompt_that_cannot_be_used_is_told_and_the_others_go_on(llm, files):
    lines = [{"prompt": [300]}, {"x": 1}, {"prompt": "hello", "nonsense": 1}, {"prompt": ""}, {"prompt": "hello"}]
    files[0].write_text("\n".join(map(json.dumps, lines)))
    list(run_batch(llm, *files, max_tokens=5))
    done = results(files[1])
    for line, message in zip(done, ["got token 300", 'needs a "prompt"', "nonsense", "nothing to go on from"]):
        assert message in line["error"]
    assert "error" not in done[4]


def test_files_that_are_something_else_are_refused(llm, files):
    files[0].write_text('{"prompt": "a"}\n[1]\n')
    with pytest.raises(ValueError, match=r"line 2 of '.*in.jsonl' is no JSON object"):
        list(run_batch(llm, *files, max_tokens=1))
    files[0].write_text("hello\n")
    with pytest.raises(ValueError, match=r"line 1 of '.*in.jsonl' is no JSON: "):
        list(run_batch(llm, *files))
    for content in ("my precious notes\n", "my precious notes"):
        files[1].write_text(content)
        with pytest.raises(ValueError, match="exists and holds no texts of `rookery batch`; name another"):
            list(run_batch(llm, *files))
        assert files[1].read_text() == content
