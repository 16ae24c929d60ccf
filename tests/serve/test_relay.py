"""Several servers on one folder, one of them killed: who answers what. No Ray; `test_cluster` has that."""

import asyncio
import contextlib
import gc
import json
from collections import Counter

import pytest

from rookery.serve.app import create_app
from rookery.serve.relay import Asked, Lost, answered, conversation_of, gathered, place_of, ranked, relay, whole
from rookery.serve.schema import ApiError
from rookery.serve.states import new_id

PLACES = ("anna0001", "ben00001", "cleo0001")


class Cluster:
    """Servers in this process that share a folder; `kill` ends one as a power cut would."""

    def __init__(self, llm, folder):
        self.apps = {place: create_app({"tiny": llm}, folder=folder, place=place) for place in PLACES}
        self.work = {place: set() for place in PLACES}
        self.asked = []

    def kill(self, place):
        del self.apps[place]
        for task in self.work[place]:
            task.cancel()

    async def ask(self, asked):
        conversation = conversation_of(asked)
        place = ranked(conversation, self.apps)[0] if conversation else min(self.apps, key=lambda p: len(self.work[p]))
        self.asked.append((place, conversation))
        messages = asyncio.Queue()

        async def work():
            async for found in answered(self.apps[place], asked):
                messages.put_nowait(found)

        task = asyncio.ensure_future(work())
        self.work[place].add(task)
        task.add_done_callback(lambda _: messages.put_nowait(None))
        try:
            while found := await messages.get():
                yield found
            if task.cancelled():
                raise Lost(place)
        finally:
            self.work[place].discard(task)
            task.cancel()

    async def post(self, path, seen=None, **body):
        """Status and body of the answer; `seen` is called with what has come so far."""
        status, text = 0, b""

        async def send(message):
            nonlocal status, text
            status = message.get("status", status)
            text += message.get("body", b"")
            if seen is not None:
                seen(text)

        headers = [(b"content-type", b"application/json")]
        await relay(Asked("POST", path, b"", headers, json.dumps(body).encode()), self.ask, send)
        return status, text.decode()


@pytest.fixture
def cluster(llm, tmp_path):
    @contextlib.asynccontextmanager
    async def running():
        cluster = Cluster(llm, tmp_path)
        async with contextlib.AsyncExitStack() as stack:
            for app in cluster.apps.values():
                await stack.enter_async_context(app.router.lifespan_context(app))
            yield cluster

    return running


def said(text):
    return json.loads(text)["output"][0]["content"][0]["text"]


def test_no_conversation_is_lost_when_a_server_dies_under_load(cluster, llm):
    turns, talks = ("Hello", "Tell me more.", "And then?"), 6

    async def talk(cluster, number):
        texts, ids = [], []
        for turn, words in enumerate(turns):
            body = {"input": words, "seed": 10 * number + turn, "max_output_tokens": 12}
            if ids:
                body["previous_response_id"] = ids[-1]
            status, text = await cluster.post("/v1/responses", **body)
            assert status == 200, text
            texts.append(said(text))
            ids.append(json.loads(text)["id"])
            if turn == 0 and number == talks - 1:
                cluster.kill(PLACES[0])  # while all others write
        return texts, [place_of(id) for id in ids]

    async def ask():
        async with cluster() as running:
            return await asyncio.gather(*(talk(running, number) for number in range(talks)))

    homes = set()
    for number, (texts, places) in enumerate(asyncio.run(ask())):
        session = llm.session()
        assert texts == [session.say(words, 12, seed=10 * number + turn) for turn, words in enumerate(turns)]
        # a conversation stays where it is as long as it can
        assert places[1:] == [places[0]] * 2 or PLACES[0] in places
        homes.add(places[0])
        assert places[-1] != PLACES[0]
    assert homes == set(PLACES)


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/completions"])
def test_a_stream_whose_server_dies_ends_with_an_error_and_can_be_asked_again(cluster, llm, path):
    async def ask():
        async with cluster() as running:
            _, text = await running.post("/v1/responses", input="Hello", seed=1, max_output_tokens=8)
            first = json.loads(text)["id"]
            home = place_of(first)
            body = {"seed": 2, "max_tokens": 40, "max_output_tokens": 40, "logit_bias": {"0": -100}}
            body |= {"input": "More", "prompt": "More", "stream": True, "state": first}

            def seen(text):
                if text.count(b"data: ") > 6 and home in running.apps:
                    running.kill(home)

            status, cut = await running.post(path, seen, **body)
            _, again = await running.post(path, **body)
            return status, cut, again

    status, cut, again = asyncio.run(ask())
    assert status == 200
    last = json.loads(cut.splitlines()[-2].removeprefix("data: "))
    assert "no conversation is lost: ask again" in json.dumps(last)
    assert last.get("error", last)["code"] == "replica_lost"
    assert cut.endswith("\n\n")

    def words(text):
        lines = [json.loads(x[6:]) for x in text.splitlines() if x.startswith("data: {")]
        return [
            x["delta"] if "delta" in x else x["choices"][0]["text"] for x in lines if "delta" in x or "choices" in x
        ]

    want = llm.session()
    want.say("Hello", 8, seed=1)
    if path == "/v1/responses":
        whole_text = want.say("More", 40, seed=2, logit_bias={0: -float("inf")})
        assert "".join(words(again)).strip() == whole_text
    else:
        want.feed("More")
        assert "".join(words(again)) == want.generate(40, seed=2, logit_bias={0: -float("inf")})
    assert "".join(words(again)).startswith("".join(words(cut)))
    assert len(words(again)) > len(words(cut)) > 1


def test_a_client_that_goes_away_frees_its_place_and_leaves_no_trace(cluster, caplog):
    async def ask():
        async with cluster() as running:
            models = [app.state.models["tiny"] for app in running.apps.values()]
            body = {"prompt": "Once", "max_tokens": 4000, "logit_bias": {"0": -100}}
            for stream in (True, False):
                task = asyncio.ensure_future(running.post("/v1/completions", **body, stream=stream))
                while not any(model.scheduler.load[0] for model in models):
                    await asyncio.sleep(0.005)
                task.cancel()
                async with asyncio.timeout(10):
                    while any(model.scheduler.load[0] for model in models):
                        await asyncio.sleep(0.005)

    asyncio.run(ask())
    gc.collect()  # what nobody has asked for would be told now
    assert "never retrieved" not in caplog.text


def test_metrics_of_all_servers_are_one_page(cluster):
    async def ask():
        async with cluster() as running:
            for number in range(2):
                await running.post("/v1/completions", prompt="Once", max_tokens=2, user=f"user {number}")
            asked = Asked("GET", "/metrics", b"", [], b"")
            found = {
                place: [message async for messages in answered(app, asked) for message in messages]
                for place, app in running.apps.items()
            }
            refused = {"anna0001": [{"status": 401}, {"body": b"a key is needed"}]}
            return gathered(found), gathered(found | refused), refused

    (start, body), refusal, refused = asyncio.run(ask())
    text = body["body"].decode()
    assert start["status"] == 200
    assert dict(start["headers"])[b"content-length"] == str(len(body["body"])).encode()
    assert text.count("# TYPE rookery_texts gauge") == 1
    samples = {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line[0] != "#"}
    written = [samples[f'rookery_engine_total{{replica="{place}",model="tiny",what="tokens"}}'] for place in PLACES]
    assert sum(written) == 4
    assert refusal == refused["anna0001"]


def test_what_no_server_can_answer_is_said_in_openais_form():
    async def none(asked):
        raise Lost("gone")
        yield

    async def full(asked):
        raise ApiError(429, "every replica is busy", retry=2)
        yield

    async def half(asked):
        yield [{"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]}]
        raise Lost("gone")

    async def ask(server):
        sent = []

        async def send(message):
            sent.append(message)

        await relay(Asked("GET", "/v1/models", b"", [], b""), server, send)
        return sent[0]["status"], dict(sent[0]["headers"])[b"retry-after"], json.loads(sent[1]["body"])["error"]["code"]

    assert asyncio.run(ask(none)) == (503, b"1", "replica_lost")
    assert asyncio.run(ask(full))[:2] == (429, b"2")
    with pytest.raises(Lost, match="cut"):  # half a file must not look whole
        asyncio.run(ask(half))


def test_bodies_are_bounded_in_size_and_time_before_they_are_sent_on():
    async def ask(*parts, complete=True):
        given = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
        given.append({"type": "http.request", "body": b"", "more_body": not complete})

        async def receive():
            return given.pop(0) if given else await asyncio.sleep(60)

        scope = {"method": "POST", "path": "/", "query_string": b"", "headers": [(b"a", b"b")]}
        return await whole(scope, receive, 1000, patience=0.05)

    assert asyncio.run(ask(b"12", b"34")).body == b"1234"
    with pytest.raises(ApiError, match="larger than 1000 bytes"):
        asyncio.run(ask(*[b"x" * 300] * 4))
    with pytest.raises(ApiError, match="not complete after 0.05 s"):
        asyncio.run(ask(b"12", complete=False))


@pytest.mark.parametrize(
    ("path", "body", "want"),
    [
        ("/v1/states/state_1/rewind", {}, "state_1"),
        ("/v1/cancel/chatcmpl-1", {}, "chatcmpl-1"),
        ("/v1/states", {"prompt": "x"}, None),
        ("/v1/responses", {"input": "x", "previous_response_id": "resp_1", "user": "anna"}, "resp_1"),
        ("/v1/completions", {"prompt": "x", "state": "state_1"}, "state_1"),
        ("/v1/completions", {"prompt": "x", "user": "anna"}, "anna"),
        ("/v1/completions", {"prompt": "x"}, None),
        ("/v1/chat/completions", {"messages": "x", "user": 3}, None),
        ("/v1/chat/completions", [1], None),
    ],
)
def test_requests_tell_their_conversation(path, body, want):
    assert conversation_of(Asked("POST", path, b"", [], json.dumps(body).encode())) == want


def test_a_chat_is_known_by_how_it_began():
    def of(*turns):
        body = {"messages": [{"role": role, "content": text} for role, text in turns]}
        return conversation_of(Asked("POST", "/v1/chat/completions", b"", [], json.dumps(body).encode()))

    begun = (("system", "Be kind."), ("user", "Hello"))
    assert of(*begun) == of(*begun, ("assistant", "Hi"), ("user", "More")) != of(begun[0], ("user", "Bye"))
    for body in (b"{", b"\xff", b"[" * 100_000, b'{"messages": {"a": 1}}', b'{"messages": [{}]}'):
        assert conversation_of(Asked("POST", "/v1/chat/completions", b"", [], body)) is None
    half = conversation_of(Asked("POST", "/v1/completions", b"", [], b'{"user": "\\ud800"}'))
    assert sorted(ranked(half, "ab")) == ["a", "b"]


def test_conversations_go_home_and_scatter_evenly_when_home_is_gone():
    places = [f"place{i:03}" for i in range(10)]
    ids = [new_id("resp_", places[0]) for _ in range(1000)]
    assert {place_of(id) for id in (*ids, new_id("chatcmpl-", places[0]))} == {places[0]}
    assert {ranked(id, places)[0] for id in ids} == {places[0]}
    counts = Counter(ranked(id, places[1:])[0] for id in ids)
    assert set(counts) == set(places[1:])
    assert max(counts.values()) < 2 * min(counts.values())
    # who has no home there moves only if his place is gone
    before, after = ([ranked(f"user {i}", those)[0] for i in range(1000)] for those in (places, places[:-1]))
    assert all(b == a for b, a in zip(before, after) if b != places[-1])
    assert 50 < before.count(places[-1]) < 200
