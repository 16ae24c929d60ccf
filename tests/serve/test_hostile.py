"""What no decent client sends: the answer is a clean 4xx, nothing is left behind, and others are served as before."""

import json
import re
import socket
import time
from pathlib import Path

import httpx
import pytest
from support.server import serving

from rookery.serve.app import create_app
from rookery.serve.hosting import Limits

PATIENCE = 0.5


@pytest.fixture(scope="module")
def app(llm):
    return create_app({"tiny": llm}, limits=Limits(rows=8, max_tokens=8))


@pytest.fixture(scope="module")
def server(app):
    with serving(app, patience=PATIENCE) as address:
        yield address


@pytest.fixture
def connected(server):
    """A fresh connection."""
    host, port = server.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        yield connection


def head(length, path="/v1/completions", *more):
    lines = (f"POST {path} HTTP/1.1", "Host: x", "Content-Type: application/json", *more)
    return "\r\n".join((*lines, *([] if length is None else [f"Content-Length: {length}"]), "", "")).encode()


def until_closed(connection):
    """All that comes before the other side closes."""
    parts = []
    try:
        while part := connection.recv(65536):
            parts.append(part)
    except ConnectionResetError:  # it closed while we still wrote
        pass
    return b"".join(parts)


def whole_answer(connection):
    """One answer with its body, however many packets it comes in; the other side need not close."""
    answer = b""
    while b"\r\n\r\n" not in answer:
        answer += received(connection, answer)
    start, _, body = answer.partition(b"\r\n\r\n")
    length = int(re.search(rb"content-length: *(\d+)", start.lower())[1])
    while len(body) < length:
        body += received(connection, answer)
    return start + b"\r\n\r\n" + body


def received(connection, before):
    part = connection.recv(65536)
    assert part, f"closed after {before!r}"
    return part


def refused(answer, status):
    """The answer is an error of OpenAI's shape, without a word of our files."""
    start, _, body = answer.partition(b"\r\n\r\n")
    assert int(start.split()[1]) == status, answer
    assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}
    assert b"Traceback" not in body
    assert b".py" not in body


def works(server):
    """The server does what it should, and holds on to nothing."""
    deadline = time.monotonic() + 20
    while not all(
        f'rookery_texts{{model="tiny",where="{where}"}} 0.0' in httpx.get(f"{server}/metrics").text
        for where in ("active", "waiting")
    ):
        assert time.monotonic() < deadline, "a text goes on for nobody"
        time.sleep(0.02)
    reply = httpx.post(f"{server}/v1/completions", json={"prompt": "Once", "max_tokens": 2, "logit_bias": {"0": -100}})
    assert reply.json()["usage"]["completion_tokens"] == 2


# clients that are slow


CHUNKED = head(None, "/v1/states", "Transfer-Encoding: chunked")
BEGUN = (b"", b"POST /v1/comp", head(10)[:-2], head(100) + b'{"prompt"', CHUNKED)


@pytest.mark.parametrize("begun", BEGUN)
def test_a_request_that_never_ends_is_cut_off(server, connected, begun):
    began = time.monotonic()
    connected.sendall(begun)
    refused(until_closed(connected), 408)
    assert time.monotonic() - began < PATIENCE + 10
    works(server)


def test_drops_do_not_set_the_clock_back(server, connected):
    began = time.monotonic()
    try:
        for byte in head(1000) + b" " * 900:
            connected.sendall(bytes([byte]))
            time.sleep(PATIENCE / 40)
            assert time.monotonic() - began < PATIENCE + 10
    except (BrokenPipeError, ConnectionResetError):
        pass
    works(server)


def test_a_connection_that_is_kept_waits_for_the_next_request(connected):
    for _ in range(2):
        connected.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        time.sleep(1.3 * PATIENCE)
        assert connected.recv(65536).startswith(b"HTTP/1.1 200")


def test_a_client_that_reads_nothing_keeps_nobody_waiting(server, connected):
    body = json.dumps({"prompt": ["Once"] * 8, "stream": True, "max_tokens": 8, "logprobs": 20}).encode()
    connected.sendall(head(len(body)) + body)
    works(server)


def test_a_half_closed_connection_ends_at_once(server, connected):
    body = json.dumps({"prompt": "Once", "max_tokens": 8}).encode()
    connected.sendall(head(len(body)) + body[:5])
    connected.shutdown(socket.SHUT_WR)
    assert b"Traceback" not in until_closed(connected)
    works(server)


# bytes that are no request


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),  # TLS spoken to a plain port
        (b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 200_000 + b"\r\n\r\n", 400),
        (head("nine"), 400),
        (head(-1), 400),
        (head(100_000_000), 413),
        (head(4) + b"{\xff\xfe}", 400),
        (head(2) + b"[]", 400),
        (b"DELETE /v1/completions HTTP/1.1\r\nHost: x\r\n\r\n", 405),
        (b"GET /%2e%2e/%2e%2e/etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n", 404),
        (b"GET /v1/states/..%2f..%2fetc%2fpasswd/file HTTP/1.1\r\nHost: x\r\n\r\n", 404),
        (b"GET /v1/models/%ff%00 HTTP/1.1\r\nHost: x\r\n\r\n", 404),
    ],
    ids=lambda value: value[:40] if isinstance(value, bytes) else None,
)
def test_bytes_that_are_no_request_get_a_clean_answer(connected, raw, status):
    connected.sendall(raw)
    connected.settimeout(20)
    refused(whole_answer(connected), status)


def resident():
    """Megabytes of memory of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory from Linux's /proc")
@pytest.mark.parametrize("chunked", [False, True])
def test_a_hundred_megabytes_are_refused_and_not_kept(server, connected, chunked):
    works(server)
    before, part = resident(), b" " * (1 << 20)
    try:
        if chunked:
            connected.sendall(head(None, "/v1/completions", "Transfer-Encoding: chunked"))
            for _ in range(100):
                connected.sendall(b"100000\r\n" + part + b"\r\n")
        else:
            connected.sendall(head(100 << 20))
            for _ in range(100):
                connected.sendall(part)
    except (BrokenPipeError, ConnectionResetError):
        pass  # it need not listen to the end
    else:
        refused(whole_answer(connected), 413)
    assert resident() < before + 40
    works(server)


# bodies that are JSON and nonsense


def chat(form):
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": form}}
    return {"messages": [{"role": "user", "content": "x"}], "max_tokens": 3, "response_format": schema}


def nested(depth):
    return {"properties": {"a": nested(depth - 1)}} if depth else {}


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ('{"prompt": "\\ud800"}', "prompt: Input should be a valid string"),
        ('{"prompt": "x", "temperature": NaN}', "temperature: Input should be"),
        ('{"prompt": "x", "top_p": 1e999}', "top_p: Input should be"),
        ('{"prompt": ' + "[" * 100_000 + "]" * 100_000 + "}", "parsing the body"),
        ('{"prompt": "x", "seed": ' + "9" * 5000 + "}", "parsing the body"),
        ('{"prompt": [' + "9" * 400 + "]}", "the model knows 0 to"),
        ('{"prompt": "x", "logit_bias": {"' + "9" * 5000 + '": 1}}', "logit_bias takes token ids"),
        (chat({"$ref": "#"}), "the JSON schema cannot be followed"),
        (chat({"const": "\ud800"}), "the schema cannot be used"),
        (chat(nested(200)), "the schema cannot be used: recursion limit"),
        (chat({"type": "string", "pattern": "("}), "the JSON schema cannot be used: regex parse error"),
        (chat({"$ref": "file:///etc/passwd"}), "the JSON schema cannot be used"),
        (chat({"enum": ["x" * 1000 + str(i) for i in range(100)]}), "up to 65536 characters"),
    ],
    ids=lambda value: str(value)[:30],
)
@pytest.mark.parametrize("stream", [False, True])
def test_nonsense_is_refused_with_a_reason(server, body, reason, stream):
    text = body if isinstance(body, str) else json.dumps(body)
    path = "/v1/completions" if isinstance(body, str) else "/v1/chat/completions"
    text = text[:-1] + ', "stream": true}' if stream else text
    reply = httpx.post(f"{server}{path}", content=text, headers={"Content-Type": "application/json"}, timeout=30)
    # what is found out while the answer is written comes as an event of the stream
    assert reply.status_code == (200 if stream and "followed" in reason else 400)
    said = reply.text.split("data: ")[-1] if reply.status_code == 200 else reply.text
    assert reason in json.loads(said)["error"]["message"]
    assert "Traceback" not in reply.text


def test_after_all_this_nothing_is_left(server, app):
    works(server)
    assert not app.state.open
