"""The whole server, on a socket and as a command: keys, limits, official clients, signals."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time

import httpx
import pytest
from support.server import free_port, serving

from rookery.serve.app import create_app, names_of
from rookery.serve.hosting import Limits
from rookery.serve.keys import Keys, new_key


@pytest.fixture(scope="module")
def server(llm):
    """Address of a running server."""
    with serving(create_app({"tiny": llm})) as address:
        yield address


# official clients


@pytest.fixture
def client(server):
    openai = pytest.importorskip("openai", reason="needs the openai package: pip install openai")
    with openai.OpenAI(base_url=f"{server}/v1", api_key="none") as client:
        yield client


def test_openais_client_completes_chats_streams_and_embeds(client, llm):
    done = client.completions.create(model="tiny", prompt="Once upon a time", max_tokens=8, temperature=0)
    assert done.choices[0].text == llm.generate("Once upon a time", 8, temperature=0)
    messages = [{"role": "user", "content": "Hello"}]
    want = llm.session().say("Hello", 8, seed=4)
    said = client.chat.completions.create(model="tiny", messages=messages, max_tokens=8, seed=4)
    assert said.choices[0].message.content == want
    stream = client.chat.completions.create(model="tiny", messages=messages, max_tokens=8, seed=4, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream).strip() == want
    assert [model.id for model in client.models.list()] == ["tiny"]
    vectors = client.embeddings.create(model="tiny", input=["a cat", "a dog"])
    assert len(vectors.data[0].embedding) == 256


def test_openais_client_responds_and_remembers(client, llm):
    session = llm.session()
    want = [session.say("Hello", 8, temperature=0), session.say("More", 8, temperature=0)]
    first = client.responses.create(model="tiny", input="Hello", max_output_tokens=8, temperature=0)
    second = client.responses.create(
        model="tiny", input="More", max_output_tokens=8, temperature=0, previous_response_id=first.id
    )
    assert [first.output_text, second.output_text] == want
    with client.responses.stream(model="tiny", input="Hello", max_output_tokens=8, temperature=0) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
    assert text == want[0]


def test_openais_client_sees_errors_as_its_own(client):
    import openai

    with pytest.raises(openai.NotFoundError, match="no model 'x'"):
        client.completions.create(model="x", prompt="a")
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.completions.create(model="tiny", prompt="a", temperature=9)


# connections


def test_a_client_that_goes_away_frees_its_place(server):
    def load():
        text = httpx.get(f"{server}/metrics").text
        return next(line for line in text.splitlines() if line.startswith('rookery_texts{model="tiny",where="active"}'))

    body = {"prompt": "Once", "max_tokens": 4000, "logit_bias": {"0": -100}}
    for more in ({"stream": True}, {}):
        address = server.removeprefix("http://").split(":")
        text = json.dumps(body | more).encode()
        with socket.create_connection((address[0], int(address[1]))) as connection:
            lines = ("POST /v1/completions HTTP/1.1", "Host: x", "Content-Type: application/json")
            head = "\r\n".join((*lines, f"Content-Length: {len(text)}", "", ""))
            connection.sendall(head.encode() + text)
            deadline = time.monotonic() + 20
            while not load().endswith(" 1.0"):
                assert time.monotonic() < deadline
                time.sleep(0.02)
        deadline = time.monotonic() + 20
        while not load().endswith(" 0.0"):
            assert time.monotonic() < deadline, "the answer goes on for nobody"
            time.sleep(0.02)


def test_a_body_without_a_length_is_counted(make):
    async def ask():
        async with make(limits=Limits(body=1000)) as client:

            async def parts():
                for _ in range(50):
                    yield b"x" * 100

            reply = await client.post("/v1/completions", content=parts())
            assert reply.status_code == 413
            assert "larger than 1000 bytes" in reply.json()["error"]["message"]

    asyncio.run(ask())


# keys


def test_only_known_keys_come_in(make, tmp_path):
    key, line = new_key("anna")
    (tmp_path / "keys").write_text(f"# who may use it\n\n{line}\n{new_key('ben')[1]}\n")
    keys = Keys.read(tmp_path / "keys")
    assert key not in line
    assert keys.owner(key) == "anna"

    async def ask():
        async with make(keys=keys) as client:
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {key}"}):
                reply = await client.get("/v1/models", headers=headers)
                assert reply.status_code == 401
                assert reply.json()["error"]["type"] == "authentication_error"
            assert (await client.get("/v1/models", headers={"Authorization": f"Bearer {key}"})).status_code == 200
            assert (await client.get("/metrics")).status_code == 401
            assert (await client.get("/health")).status_code == 200
            assert (await client.get("/")).status_code == 200

    asyncio.run(ask())


def test_a_bad_key_file_is_refused(tmp_path):
    (tmp_path / "keys").write_text("anna:secret\n")
    with pytest.raises(ValueError, match="line 1: expected name:sha256"):
        Keys.read(tmp_path / "keys")
    (tmp_path / "keys").write_text("\n")
    with pytest.raises(ValueError, match="holds no key"):
        Keys.read(tmp_path / "keys")
    with pytest.raises(ValueError, match="a key's name"):
        new_key("a b")


# page, health, names


def test_the_page_asks_nobody_else_for_anything(make):
    async def ask():
        async with make() as client:
            page = await client.get("/")
            assert page.headers["content-type"].startswith("text/html")
            assert "default-src 'none'" in page.headers["content-security-policy"]
            assert "http://" not in page.text.replace("http://www.w3.org", "")
            assert "https://" not in page.text
            client.app.state.draining = True
            assert (await client.get("/health")).status_code == 503
            reply = await client.get("/v1/models")
            assert reply.status_code == 503
            assert "retry-after" in reply.headers

    asyncio.run(ask())


def test_pages_of_other_hosts_need_to_be_allowed(make):
    async def ask():
        header = "access-control-allow-origin"
        async with make(origins=["https://a.example"]) as client:
            for origin, allowed in (("https://a.example", True), ("https://b.example", False)):
                reply = await client.get("/health", headers={"Origin": origin})
                assert (header in reply.headers) == allowed

    asyncio.run(ask())


def test_models_have_names_of_their_own():
    assert names_of([None, "a/x.pth", "b/x.pth", "c/x-1.gguf"]) == ["embedded", "x", "x-2", "x-1"]


# the command


@pytest.mark.skipif(os.name != "posix", reason="signals are those of POSIX")
def test_sigterm_lets_an_open_answer_end():
    port = free_port()
    command = [sys.executable, "-m", "rookery", "serve", "--port", str(port), "--threads", "1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            for line in process.stderr:
                if "serves embedded" in line:
                    break
            address = f"http://127.0.0.1:{port}"
            deadline = time.monotonic() + 30
            while True:
                try:
                    assert httpx.get(f"{address}/health").status_code == 200
                    break
                except httpx.TransportError:
                    assert time.monotonic() < deadline
                    time.sleep(0.05)
            body = {"prompt": "Once upon a time", "max_tokens": 300, "logit_bias": {"0": -100}, "stream": True}
            with httpx.stream("POST", f"{address}/v1/completions", json=body, timeout=60) as reply:
                lines = reply.iter_lines()
                next(lines)
                process.send_signal(signal.SIGTERM)
                rest = [line for line in lines if line]
            assert rest[-1] == "data: [DONE]"
            assert len(rest) > 250
            log = process.stderr.read()
            assert '"route": "/v1/completions"' in log
            assert "Once upon" not in log
            process.wait(timeout=30)
        finally:
            process.kill()
