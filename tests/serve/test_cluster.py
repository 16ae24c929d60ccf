"""A real Ray cluster of three replicas on this machine, one of them killed under load."""

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

from rookery.serve.relay import place_of

pytestmark = pytest.mark.slow

TURNS = ("Hello", "Tell me more.", "And then?")
TALKS = 9


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The server's process and address."""
    pytest.importorskip("ray", reason='needs Ray: pip install "rookery[cluster]"')
    folder = tmp_path_factory.mktemp("states")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    given = ("--ray", "--replicas", 3, "--threads", 1, "--template", "g1", "--port", port, "--state-folder", folder)
    command = [sys.executable, "-m", "rookery", "serve", *map(str, given), "--drain", "20"]
    # where others work, too, Ray starts slowly
    patient = os.environ | {"RAY_raylet_start_wait_time_s": "120"}
    with open(folder / "log", "w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=patient)
    try:
        until = time.monotonic() + 600
        while "serves from 3 replicas" not in (folder / "log").read_text():
            assert server.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < until, (folder / "log").read_text()
            time.sleep(0.5)
        yield server, f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(120)


def replicas(server):
    """Process ids of the replicas of our own cluster."""
    import psutil

    found = psutil.Process(server.pid).children(recursive=True)
    return [process.pid for process in found if "ServeReplica:rookery:replica" in " ".join(process.cmdline())]


def request(number, turn, before):
    body = {"input": TURNS[turn], "seed": 10 * number + turn, "max_output_tokens": 16}
    return body | ({"previous_response_id": before} if before else {})


async def talk(client, number, kill):
    """Texts of a conversation and the places where they were written; every second one streams."""
    texts, places, before, broken = [], [], None, 0
    for turn in range(len(TURNS)):
        if number == 0 and turn == 1:
            kill()
        body = request(number, turn, before)
        while number % 2:
            last = None
            async with client.stream("POST", "/v1/responses", json=body | {"stream": True}) as reply:
                assert reply.status_code == 200
                async for line in reply.aiter_lines():
                    if line.startswith("data: "):
                        last = json.loads(line[6:])
            if "response" in last:
                answer = last["response"]
                break
            assert last["code"] == "replica_lost"
            broken += 1
        else:
            reply = await client.post("/v1/responses", json=body)
            assert reply.status_code == 200, reply.text
            answer = reply.json()
        before = answer["id"]
        places.append(place_of(before))
        texts.append(answer["output"][0]["content"][0]["text"].strip())
    return texts, places, broken


def test_no_conversation_is_lost_when_a_replica_is_killed_under_load(server, llm):
    process, address = server
    before = replicas(process)
    assert len(before) == 3

    def kill():
        os.kill(before[0], signal.SIGKILL)

    async def ask():
        async with httpx.AsyncClient(base_url=address, timeout=120) as client:
            found = await asyncio.gather(*(talk(client, number, kill) for number in range(TALKS)))
            # a text that nobody waits for any more is ended, wherever it is written
            body = {"prompt": "Once", "max_tokens": 4000, "logit_bias": {"0": -100}}
            with pytest.raises(httpx.ReadTimeout):
                await client.post("/v1/completions", json=body, timeout=1.5)
            await asyncio.sleep(1)
            metrics = (await client.get("/metrics")).text
            for place in {place for _, places, _ in found for place in places[-1:]}:
                assert f'rookery_texts{{replica="{place}",model="embedded",where="active"}} 0.0' in metrics
            return found

    found = asyncio.run(ask())
    for number, (texts, _, _) in enumerate(found):
        session = llm.session()
        assert texts == [session.say(words, 16, seed=10 * number + turn) for turn, words in enumerate(TURNS)]
    until = time.monotonic() + 120
    while len(now := replicas(process)) < 3 or before[0] in now:  # Ray has put another in its place
        assert time.monotonic() < until
        time.sleep(0.5)


def test_sigterm_lets_open_answers_end(server, llm):
    process, address = server
    body = {"prompt": "Once upon a time", "seed": 3, "max_tokens": 60, "stream": True, "logit_bias": {"0": -100}}
    text = ""
    with httpx.stream("POST", f"{address}/v1/completions", json=body, timeout=60) as reply:
        for line in reply.iter_lines():
            if line.startswith("data: {"):
                if not text:
                    process.terminate()
                text += json.loads(line[6:])["choices"][0]["text"]
    assert text == llm.generate("Once upon a time", 60, seed=3, logit_bias={0: -float("inf")})
    assert process.wait(120) == 0
