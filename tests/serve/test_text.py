"""Completions and chat: what clients get is what the engine gives alone."""

import asyncio
import json

import numpy as np
import pytest

from rookery.checkpoints.tuned_state import save_tuned_state
from rookery.serve.hosting import Limits
from rookery.serve.prompts import call_grammar
from rookery.serve.watching import norms

GREEDY = {"temperature": 0, "max_tokens": 12}
ONCE = "Once upon a time"


def run(coroutine):
    return asyncio.run(coroutine)


async def chunks(client, path, body):
    """The events of a stream as dictionaries; the last line must say that it is over."""
    found = []
    async with client.stream("POST", path, json=body | {"stream": True}) as reply:
        assert reply.status_code == 200, await reply.aread()
        assert reply.headers["content-type"].startswith("text/event-stream")
        async for line in reply.aiter_lines():
            if line:
                assert line.startswith("data: ")
                found.append(line.removeprefix("data: "))
    assert found.pop() == "[DONE]"
    return [json.loads(line) for line in found]


def test_a_completion_is_the_text_of_the_engine(make, llm):
    async def ask():
        async with make() as client:
            reply = await client.post("/v1/completions", json={"prompt": ONCE, **GREEDY})
            body = reply.json()
            assert body["choices"][0]["text"] == llm.generate(ONCE, 12, temperature=0)
            assert body["choices"][0]["finish_reason"] == "length"
            assert body["usage"]["completion_tokens"] == 12
            assert body["usage"]["prompt_tokens"] == len(llm.tokenizer.encode(ONCE))
            by_ids = {"prompt": llm.tokenizer.encode(ONCE), **GREEDY}
            assert (await client.post("/v1/completions", json=by_ids)).json()["choices"] == body["choices"]

    run(ask())


def test_a_stream_is_the_same_text_in_pieces(make, llm):
    async def ask():
        async with make() as client:
            body = {"prompt": ONCE, "seed": 5, "max_tokens": 20, "stream_options": {"include_usage": True}}
            found = await chunks(client, "/v1/completions", body)
            text = "".join(c["choices"][0]["text"] for c in found if c["choices"])
            assert text == llm.generate(ONCE, 20, seed=5)
            assert found[-1]["usage"]["completion_tokens"] == 20
            assert found[-2]["choices"][0]["finish_reason"] == "length"
            assert len({c["id"] for c in found}) == 1

    run(ask())


def test_several_prompts_and_answers_are_told_apart(make, llm):
    async def ask():
        async with make() as client:
            body = {"prompt": [ONCE, "One day"], "n": 2, "seed": 3, "max_tokens": 8}
            choices = (await client.post("/v1/completions", json=body)).json()["choices"]
            want = [llm.generate(p, 8, seed=s) for p in (ONCE, "One day") for s in (3, 4)]
            assert [choice["text"] for choice in choices] == want
            found = await chunks(client, "/v1/completions", body)
            texts = [""] * 4
            for chunk in found:
                texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
            assert texts == want

    run(ask())


def test_many_streams_at_once_each_equal_their_lone_run(make, llm):
    async def ask():
        async with make(limits=Limits(rows=8)) as client:
            bodies = [{"prompt": f"{ONCE} there was a {i}", "seed": i, "max_tokens": 16} for i in range(24)]
            found = await asyncio.gather(*(chunks(client, "/v1/completions", body) for body in bodies))
            for body, stream in zip(bodies, found):
                text = "".join(chunk["choices"][0]["text"] for chunk in stream)
                assert text == llm.generate(body["prompt"], 16, seed=body["seed"])

    run(ask())


def test_options_reach_the_engine(make, llm):
    async def ask():
        async with make() as client:
            token = llm.tokenizer.encode(ONCE)[0]
            body = {"prompt": ONCE, **GREEDY, "stop": [" girl"], "echo": True, "logprobs": 3}
            choice = (await client.post("/v1/completions", json=body)).json()["choices"][0]
            assert choice["text"] == ONCE + llm.generate(ONCE, 12, temperature=0, stop=" girl")
            assert choice["finish_reason"] == "stop"
            assert all(len(top) == 3 for top in choice["logprobs"]["top_logprobs"])
            assert max(choice["logprobs"]["token_logprobs"]) <= 0
            biased = {"prompt": ONCE, **GREEDY, "logit_bias": {str(token): 100}}
            choice = (await client.post("/v1/completions", json=biased)).json()["choices"][0]
            assert choice["text"] == llm.generate(
                [*llm.tokenizer.encode(ONCE)], 12, temperature=0, logit_bias={token: 100}
            )
            empty = {"prompt": "", **GREEDY}
            choice = (await client.post("/v1/completions", json=empty)).json()["choices"][0]
            assert choice["text"] == llm.generate([0], 12, temperature=0)

    run(ask())


def test_an_answer_can_be_held_to_a_schema(make):
    async def ask():
        async with make() as client:
            schema = {
                "type": "object",
                "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}, "ok": {"type": "boolean"}},
                "required": ["n", "ok"],
                "additionalProperties": False,
            }
            form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
            body = {"messages": [{"role": "user", "content": "How many?"}], "response_format": form, "seed": 1}
            body |= {"max_tokens": 200}
            message = (await client.post("/v1/chat/completions", json=body)).json()["choices"][0]["message"]
            answer = json.loads(message["content"])
            assert set(answer) == {"n", "ok"}
            assert isinstance(answer["ok"], bool)

    run(ask())


# chat


def test_a_chat_goes_through_the_models_template(make, llm):
    async def ask():
        async with make() as client:
            messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}]
            body = {"messages": messages, "max_tokens": 10, "seed": 2}
            choice = (await client.post("/v1/chat/completions", json=body)).json()["choices"][0]
            want = llm.session().say("Hello", 10, system="Be kind.", seed=2)
            assert choice["message"] == {"role": "assistant", "content": want}
            found = await chunks(client, "/v1/chat/completions", body | {"logprobs": True, "top_logprobs": 2})
            assert found[0]["choices"][0]["delta"]["role"] == "assistant"
            deltas = [chunk["choices"][0]["delta"].get("content") or "" for chunk in found]
            assert "".join(deltas).strip() == want
            told = [c["choices"][0]["logprobs"]["content"] for c in found if c["choices"][0].get("logprobs")]
            assert all(len(one["top_logprobs"]) == 2 for some in told for one in some)

    run(ask())


def test_a_conversation_in_parts_is_continued_from_its_state(make, llm):
    async def ask():
        async with make() as client:
            session = llm.session()
            want = [session.say("Hello", 8, seed=1), session.say("And then?", 8, seed=2)]
            body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8, "seed": 1, "keep_state": True}
            first = (await client.post("/v1/chat/completions", json=body)).json()["choices"][0]
            body = {"messages": [{"role": "user", "content": "And then?"}], "max_tokens": 8, "seed": 2}
            body |= {"state": first["state"]["id"]}
            second = (await client.post("/v1/chat/completions", json=body)).json()["choices"][0]
            assert [first["message"]["content"], second["message"]["content"]] == want

    run(ask())


TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "What the weather is",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 3}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}


def test_tools_are_called_with_arguments_of_their_schema(make, llm):
    async def ask():
        async with make() as client:
            body = {
                "messages": [{"role": "user", "content": "Weather?"}],
                "tools": [TOOL],
                "seed": 3,
                "max_tokens": 300,
            }
            choice = (await client.post("/v1/chat/completions", json=body)).json()["choices"][0]
            assert choice["finish_reason"] == "tool_calls"
            (call,) = choice["message"]["tool_calls"]
            assert call["function"]["name"] == "weather"
            arguments = json.loads(call["function"]["arguments"])
            assert arguments["city"] in ("Oslo", "Rome")
            assert arguments["days"] in (1, 2, 3)
            found = await chunks(client, "/v1/chat/completions", body)
            assert found[-1]["choices"][0]["delta"]["tool_calls"][0]["function"] == call["function"]
            # with the result the model answers in words
            messages = [*body["messages"], choice["message"], {"role": "tool", "content": "sunny"}]
            body |= {"messages": messages, "max_tokens": 5}
            choice = (await client.post("/v1/chat/completions", json=body)).json()["choices"][0]
            assert choice["message"]["content"]
            assert "tool_calls" not in choice["message"]
            found = await chunks(client, "/v1/chat/completions", body)
            deltas = [chunk["choices"][0]["delta"].get("content") or "" for chunk in found]
            assert len(deltas) > 3  # words are not held back
            assert "".join(deltas).strip() == choice["message"]["content"]
            # or calls again
            (brace,) = llm.tokenizer.encode("{")
            body |= {"logit_bias": {str(brace): 100}, "max_tokens": 300}
            choice = (await client.post("/v1/chat/completions", json=body)).json()["choices"][0]
            assert choice["message"]["tool_calls"][0]["function"]["name"] == "weather"
            assert choice["finish_reason"] == "tool_calls"
            found = await chunks(client, "/v1/chat/completions", body)
            assert found[-1]["choices"][0]["delta"]["tool_calls"][0]["function"]["name"] == "weather"
            assert not any(chunk["choices"][0]["delta"].get("content") for chunk in found)

    run(ask())


def test_schemas_of_tools_may_refer_to_their_parts(make):
    async def ask():
        async with make() as client:
            city = {"type": "object", "properties": {"name": {"enum": ["Oslo"]}}, "required": ["name"]}
            city |= {"additionalProperties": False}
            schema = {"$defs": {"City": city}, "type": "object", "properties": {"city": {"$ref": "#/$defs/City"}}}
            schema |= {"required": ["city"], "additionalProperties": False}
            tools = [{"type": "function", "function": {"name": name, "parameters": schema}} for name in ("a", "b")]
            body = {"messages": [{"role": "user", "content": "x"}], "tools": tools, "seed": 1, "max_tokens": 200}
            choice = (await client.post("/v1/chat/completions", json=body)).json()["choices"][0]
            assert json.loads(choice["message"]["tool_calls"][0]["function"]["arguments"]) == {"city": {"name": "Oslo"}}
            deep = {}
            for _ in range(400):
                deep = {"properties": {"a": deep}}
            body["tools"] = [{"type": "function", "function": {"name": "a", "parameters": deep}}]
            reply = await client.post("/v1/chat/completions", json=body)
            assert reply.status_code == 400
            assert "the schema cannot be used" in reply.json()["error"]["message"]

    run(ask())


def test_a_tool_that_is_not_there_cannot_be_chosen(make):
    async def ask():
        async with make() as client:
            body = {"messages": [{"role": "user", "content": "x"}], "tools": [TOOL]}
            body |= {"tool_choice": {"type": "function", "function": {"name": "time"}}}
            reply = await client.post("/v1/chat/completions", json=body)
            assert reply.status_code == 400
            assert "'time', which is not in tools" in reply.json()["error"]["message"]

    run(ask())
    assert call_grammar([TOOL]).what == "JSON schema"


# ends


def test_cancelling_ends_an_answer_and_keeps_its_state(make, llm):
    async def ask():
        async with make() as client:
            body = {"prompt": ONCE, "max_tokens": 4000, "temperature": 0, "keep_state": True, "stream": True}
            task = asyncio.ensure_future(chunks(client, "/v1/completions", body))
            while not client.app.state.open:
                await asyncio.sleep(0.01)
            (id,) = client.app.state.open
            while next(iter(client.app.state.open.values()))[0].tokens < 3:
                await asyncio.sleep(0.01)
            assert (await client.post(f"/v1/cancel/{id}")).json()["cancelled"]
            found = await task
            text = "".join(chunk["choices"][0]["text"] for chunk in found)
            assert 0 < len(text) < 12_000
            assert llm.generate(ONCE, 1000, temperature=0, ignore_eos=True).startswith(text[:200])
            state = found[-1]["choices"][0]["state"]
            seen = len(llm.tokenizer.encode(ONCE)) + len(llm.tokenizer.encode(text))
            assert abs(state["tokens_seen"] - seen) <= 1
            assert client.app.state.models["tiny"].scheduler.load == (0, 0)

    run(ask())


def test_an_answer_that_takes_too_long_is_ended_and_said_so(make):
    async def ask():
        async with make(limits=Limits(seconds=0.2, max_tokens=10**6)) as client:
            body = {"prompt": ONCE, "max_tokens": 10**6, "logit_bias": {"0": -100}}
            reply = await client.post("/v1/completions", json=body)
            assert reply.status_code == 408
            assert "more than 0.2 s" in reply.json()["error"]["message"]

    run(ask())


def test_a_full_queue_turns_away_with_the_time_to_wait(make):
    async def ask():
        async with make(limits=Limits(rows=1, queue=1, max_tokens=10**6)) as client:
            body = {"prompt": ONCE, "max_tokens": 10**6, "logit_bias": {"0": -100}}
            long = [asyncio.ensure_future(client.post("/v1/completions", json=body))]
            scheduler = client.app.state.models["tiny"].scheduler
            while scheduler.load[0] < 1:
                await asyncio.sleep(0.01)
            long.append(asyncio.ensure_future(client.post("/v1/completions", json=body)))
            while scheduler.load[1] < 1:
                await asyncio.sleep(0.01)
            reply = await client.post("/v1/completions", json=body)
            assert reply.status_code == 429
            assert reply.headers["retry-after"] == "2"
            assert reply.json()["error"]["type"] == "rate_limit_error"
            for task in long:
                task.cancel()

    run(ask())


@pytest.mark.parametrize(
    ("path", "body", "status", "reason"),
    [
        ("/v1/completions", {"prompt": 5}, 400, "prompt: Input should be"),
        ("/v1/completions", {"prompt": [99999999]}, 400, "token 99999999, the model knows"),
        ("/v1/completions", {"prompt": "x", "temperature": -1}, 400, "temperature: Input should be greater"),
        ("/v1/completions", {"prompt": "x", "model": "gpt-5"}, 404, "no model 'gpt-5'; there are: tiny"),
        ("/v1/completions", {"prompt": "x", "logit_bias": {"a": 1}}, 400, "logit_bias takes token ids"),
        ("/v1/completions", {"prompt": "x", "stop": [""]}, 400, "stop takes up to 16 strings"),
        ("/v1/completions", {"prompt": ["x"] * 100, "n": 2}, 400, "more than 128 texts"),
        ("/v1/completions", {"prompt": "x", "state": "state_0"}, 404, "no state 'state_0' is kept"),
        ("/v1/chat/completions", {"messages": []}, 400, "messages: List should have at least 1"),
        ("/v1/chat/completions", {"messages": [{"role": "king", "content": "x"}]}, 400, "role: Input should be"),
        ("/v1/chat/completions", {"messages": [{"role": "system", "content": "x"}]}, 400, 'role "user"'),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "x"}], "response_format": {"type": "json_schema"}},
            400,
            "needs json_schema.schema",
        ),
        ("/v1/embeddings", {"input": []}, 400, "input: "),
    ],
)
def test_a_wrong_request_gets_openais_error_with_a_text_that_helps(make, path, body, status, reason):
    async def ask():
        async with make() as client:
            reply = await client.post(path, json=body)
            assert reply.status_code == status
            error = reply.json()["error"]
            assert reason in error["message"]
            assert set(error) == {"message", "type", "param", "code"}

    run(ask())


def test_a_model_that_cannot_converse_says_what_to_use(make):
    from rookery.engine.llm import LLM

    async def ask():
        async with make(models={"plain": LLM()}) as client:
            reply = await client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "x"}]})
            assert reply.status_code == 400
            assert "use /v1/completions" in reply.json()["error"]["message"]

    run(ask())


@pytest.fixture
def pirate(llm, tmp_path):
    """A tuned state of the model."""
    config = llm.runner.config
    draw = np.random.default_rng(1)
    state = {f"layers.{i}.wkv": 20 * draw.normal(size=config.wkv_shape) for i in range(config.num_hidden_layers)}
    save_tuned_state(tmp_path / "pirate.safetensors", state, config)
    return tmp_path / "pirate.safetensors"


def test_a_tuned_state_is_a_model_of_its_name(make, llm, pirate):
    models = {"tiny": llm, "pirate": llm.starting_from(pirate)}

    async def ask():
        async with make(models=models, parents={"pirate": "tiny"}) as client:
            listed = {model["id"]: model["parent"] for model in (await client.get("/v1/models")).json()["data"]}
            assert listed == {"tiny": None, "pirate": "tiny"}
            body = {"prompt": "He", "seed": 1, "max_tokens": 12}
            replies = await asyncio.gather(*(client.post("/v1/completions", json=body | {"model": m}) for m in models))
            session = llm.session(pirate)
            session.feed("He")
            want = [llm.generate("He", 12, seed=1), session.generate(12, seed=1)]
            assert [reply.json()["choices"][0]["text"] for reply in replies] == want
            assert want[0] != want[1]
            # one batch for both: the metrics know one scheduler
            assert (await client.get("/metrics")).text.count('where="active"') == 1
            # and without a restart: the file as a kept state
            id = (await client.post("/v1/states/import", content=pirate.read_bytes())).json()["id"]
            text = (await client.post("/v1/completions", json=body | {"state": id})).json()["choices"][0]["text"]
            assert text == want[1]

    run(ask())


def test_a_watched_stream_tells_how_the_state_moves(make, llm, monkeypatch):
    monkeypatch.setattr("rookery.serve.watching.PAUSE", 0.0)
    monkeypatch.setattr("rookery.serve.watching.SHARE", float("inf"))
    prompt = [llm.tokenizer.encode(ONCE)[i % 4] for i in range(600)]

    async def ask():
        async with make() as client:
            body = {"prompt": prompt, "max_tokens": 8, "seed": 1, "watch": True}
            found = await chunks(client, "/v1/completions", body)
            text = "".join(chunk["choices"][0]["text"] for chunk in found if chunk["choices"])
            assert text == llm.generate(prompt, 8, seed=1)
            moved = [chunk["progress"] for chunk in found if "progress" in chunk]
            # 256 tokens of a prompt at a time, and a place where it is kept
            assert {256, 600} <= {one["read"] for one in moved}
            assert moved == sorted(moved, key=lambda one: (one["read"], one["written"]))
            assert all(one["prompt"] == 600 for one in moved)
            assert len({json.dumps(one["norms"]) for one in moved}) == len(moved)
            session = llm.session()
            session.feed(prompt)
            last = moved[-1]
            session.feed(list(session.fork().stream_tokens(8, seed=1))[: last["written"]])
            np.testing.assert_allclose(last["norms"], norms(session.state), rtol=1e-5)
            assert "progress" not in json.dumps(await chunks(client, "/v1/completions", body | {"watch": False}))
            messages = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4, "watch": True}
            assert any("progress" in chunk for chunk in await chunks(client, "/v1/chat/completions", messages))

    run(ask())
