import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from rookery.data.describe import (
    GenerationFailed,
    LLMFuser,
    TemplateFuser,
    cleaned,
    describe_file,
    endpoint,
    problem_with,
)


@pytest.fixture
def server():
    """A server of OpenAI's protocol that answers with what its list `answers` holds, an int being a status."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append((self.path, self.headers, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
            answer = answers.pop(0)
            self.send_response(answer if isinstance(answer, int) else 200)
            self.end_headers()
            self.wfile.write(json.dumps({"choices": [{"message": {"content": answer}}]}).encode())

        def log_message(self, *_):
            pass

    asked, answers = [], []
    http = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{http.server_port}/v1", asked, answers
    http.shutdown()
    http.server_close()
    thread.join()


def test_the_template_joins_what_is_known_without_repeating_it():
    fuse = TemplateFuser()
    said = fuse("#Holiday IMG_2041.JPG Rome https://x.example", "a dog on a beach.", ["dog", "umbrella", "umbrella"])
    assert said == "Holiday Rome, a dog on a beach, with umbrella"
    assert fuse("", "", ["cat", "mat"]) == "cat, mat"
    assert fuse("A dog.", "a dog", []) == "A dog"
    assert fuse("", "", []) == ""


def test_texts_of_the_web_lose_addresses_and_file_names():
    assert cleaned("see www.shop.example | photo_1.png  #sale_now") == "see sale now"


@pytest.mark.parametrize(
    ("description", "problem"),
    [
        ("A dog runs on the beach", None),
        ("Two dogs on beaches", None),
        (" ", "empty"),
        ("dog " * 40, "long"),
        ("A dog beside a purple helicopter and a wizard", "invented"),
    ],
)
def test_descriptions_that_say_more_than_is_known_are_dropped(description, problem):
    assert problem_with(description, "Rex on holiday", "a dog running along the beach", ["dog"]) == problem


def test_a_language_model_behind_an_endpoint_describes(server):
    url, asked, answers = server
    answers += ['"A dog on a beach."\nIt is nice.']
    fuse = LLMFuser(endpoint(url, "tiny", "secret"))
    assert fuse("Rex", "a dog on a beach", ["dog"]) == "A dog on a beach."
    path, headers, request = asked[0]
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer secret"
    assert request["model"] == "tiny"
    prompt = request["messages"][0]["content"]
    assert all(part in prompt for part in ("beside it: Rex", "wrote: a dog on a beach", "detected: dog"))


def test_a_failing_endpoint_is_asked_again_and_then_given_up(server, monkeypatch):
    url, asked, answers = server
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    answers += [500, "fine"]
    assert endpoint(url, "tiny")("hello") == "fine"
    answers += [500, 500, 500, 400]
    for count in (5, 6):  # three times, then once: what is refused for good is not asked again
        with pytest.raises(GenerationFailed, match="gave no description"):
            endpoint(url, "tiny")("hello")
        assert len(asked) == count


def test_a_file_gets_descriptions_and_says_what_was_dropped(tmp_path):
    rows = [
        {"image": "a.png", "raw": "Rex", "synthetic": "a dog", "tags": ["dog", "ball"]},
        {"image": "b.png", "raw": "tree"},
        {"image": "c.png"},
    ]
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    counts = describe_file(source, out, TemplateFuser())
    assert counts == {"kept": 2, "nothing": 1}
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row.get("generated") for row in written] == ["Rex, a dog, with ball", "tree", None]
    source.write_text("{")
    with pytest.raises(ValueError, match="line 1 is not JSON"):
        describe_file(source, tmp_path / "other.jsonl", TemplateFuser())
    assert not (tmp_path / "other.jsonl").exists()
