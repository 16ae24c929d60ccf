"""Kept states and the conversations that the server remembers."""

import asyncio
import json
import os
import time

import pytest

from rookery.serve.hosting import Limits
from rookery.serve.keys import Keys, new_key
from rookery.serve.schema import ApiError
from rookery.serve.states import StateStore

GREEDY = {"temperature": 0, "max_tokens": 8}


def run(coroutine):
    return asyncio.run(coroutine)


def test_a_prompt_is_read_once_and_continued_many_times(make, llm):
    async def ask():
        async with make() as client:
            state = (await client.post("/v1/states", json={"prompt": "Once upon a time"})).json()
            assert state["tokens_seen"] == len(llm.tokenizer.encode("Once upon a time"))
            assert state["bytes"] == llm.session().nbytes
            for _ in range(2):
                body = {"prompt": " there was a cat", "state": state["id"], **GREEDY}
                text = (await client.post("/v1/completions", json=body)).json()["choices"][0]["text"]
                session = llm.session()
                session.feed("Once upon a time")
                session.feed(" there was a cat")
                assert text == session.generate(8, temperature=0)
            go_on = {"prompt": "", "state": state["id"], **GREEDY}
            text = (await client.post("/v1/completions", json=go_on)).json()["choices"][0]["text"]
            assert text == llm.generate("Once upon a time", 8, temperature=0)

    run(ask())


def test_states_make_a_tree_that_can_be_rewound_exported_and_forgotten(make, llm, tmp_path):
    async def ask():
        async with make() as client:
            root = (await client.post("/v1/states", json={"prompt": "One day"})).json()
            leaf = (await client.post("/v1/states", json={"prompt": ", a dog ran", "state": root["id"]})).json()
            assert leaf["parent"] == root["id"]
            twin = (await client.post(f"/v1/states/{leaf['id']}/fork")).json()
            assert (twin["parent"], twin["tokens_seen"]) == (leaf["id"], leaf["tokens_seen"])
            back = await client.post(f"/v1/states/{twin['id']}/rewind", json={"tokens_seen": root["tokens_seen"]})
            assert back.json()["id"] == root["id"]
            assert (await client.post(f"/v1/states/{twin['id']}/rewind", json={"tokens_seen": 0})).status_code == 404
            listed = (await client.get("/v1/states")).json()
            assert [state["id"] for state in listed["data"]] == [root["id"], leaf["id"], twin["id"]]
            norms = (await client.get(f"/v1/states/{leaf['id']}/picture")).json()["norms"]
            assert len(norms) == 4
            assert all(len(heads) == 4 and min(heads) > 0 for heads in norms)

            file = (await client.get(f"/v1/states/{leaf['id']}/file")).content
            (tmp_path / "leaf.state").write_bytes(file)
            assert llm.session(tmp_path / "leaf.state").tokens_seen == leaf["tokens_seen"]
            again = (await client.post("/v1/states/import", content=file)).json()
            body = {"prompt": "", **GREEDY}
            texts = [
                (await client.post("/v1/completions", json=body | {"state": s})).json()["choices"][0]["text"]
                for s in (leaf["id"], again["id"])
            ]
            assert texts[0] == texts[1]

            assert (await client.delete(f"/v1/states/{leaf['id']}")).json()["deleted"]
            assert (await client.get(f"/v1/states/{leaf['id']}")).status_code == 404

    run(ask())


@pytest.mark.parametrize("damage", ["nothing", "half", "noise"])
def test_a_damaged_state_is_refused(make, damage):
    async def ask():
        async with make() as client:
            id = (await client.post("/v1/states", json={"prompt": "One day"})).json()["id"]
            file = (await client.get(f"/v1/states/{id}/file")).content
            bad = {"nothing": b"", "half": file[: len(file) // 2], "noise": bytes(reversed(file))}[damage]
            reply = await client.post("/v1/states/import", content=bad)
            assert reply.status_code == 400
            assert "the file" in reply.json()["error"]["message"]
            assert "/" not in reply.json()["error"]["message"].replace("and/or", "")

    run(ask())


def test_ids_that_are_paths_find_nothing(make):
    async def ask():
        async with make() as client:
            for id in ("../../etc/passwd", "..%2f..%2fetc%2fpasswd", "%00", "a" * 5000):
                for part in ("", "/file", "/picture"):
                    assert (await client.get(f"/v1/states/{id}{part}")).status_code == 404

    run(ask())


def test_the_least_recently_used_state_makes_room(llm):
    size = llm.session().nbytes
    store = StateStore(llm, 3 * size, 60)
    ids = [store.keep(llm.session(), None, "").id for _ in range(3)]
    store.get(ids[0])
    store.keep(llm.session(), None, "")
    assert len(store) == 3
    with pytest.raises(ApiError, match="may have expired or made room"):
        store.get(ids[1])
    assert store.get(ids[0]).id == ids[0]
    with pytest.raises(ApiError, match="the server keeps 10 in all"):
        StateStore(llm, 10, 60).keep(llm.session(), None, "")


def test_an_unused_state_expires(llm):
    store = StateStore(llm, 1 << 30, 0.0)
    id = store.keep(llm.session(), None, "").id
    with pytest.raises(ApiError, match="no state"):
        store.get(id)


# responses


def test_a_response_remembers_what_was_said(make, llm):
    async def ask():
        async with make() as client:
            session = llm.session()
            want = [session.say("Hello", 8, system="Be kind.", seed=1), session.say("More", 8, seed=2)]
            body = {"input": "Hello", "instructions": "Be kind.", "max_output_tokens": 8, "seed": 1}
            first = (await client.post("/v1/responses", json=body)).json()
            assert first["status"] == "incomplete"
            assert first["incomplete_details"] == {"reason": "max_output_tokens"}
            body = {"input": "More", "max_output_tokens": 8, "seed": 2, "previous_response_id": first["id"]}
            second = (await client.post("/v1/responses", json=body)).json()
            assert [r["output"][0]["content"][0]["text"] for r in (first, second)] == want
            assert (await client.get(f"/v1/responses/{second['id']}")).json()["parent"] == first["id"]
            assert (await client.delete(f"/v1/responses/{first['id']}")).json()["deleted"]
            assert (await client.get(f"/v1/responses/{first['id']}")).status_code == 404
            assert (await client.delete(f"/v1/responses/{first['id']}")).status_code == 404
            assert (await client.post("/v1/responses", json=body | {"tools": [{}]})).status_code == 400
            assert (await client.post("/v1/responses", json=body)).status_code == 404
            body |= {"store": False, "previous_response_id": second["id"]}
            unkept = (await client.post("/v1/responses", json=body)).json()
            assert (await client.get(f"/v1/responses/{unkept['id']}")).status_code == 404

    run(ask())


def test_the_events_of_a_response_add_up_to_it(make, llm):
    async def ask():
        async with make() as client:
            body = {"input": "Hello", "max_output_tokens": 8, "seed": 1, "stream": True}
            found = []
            async with client.stream("POST", "/v1/responses", json=body) as reply:
                async for line in reply.aiter_lines():
                    if line.startswith("data: "):
                        found.append(json.loads(line.removeprefix("data: ")))
            assert [event["sequence_number"] for event in found] == list(range(len(found)))
            assert [found[0]["type"], found[-1]["type"]] == ["response.created", "response.incomplete"]
            text = "".join(event["delta"] for event in found if event["type"] == "response.output_text.delta")
            assert text.strip() == llm.session().say("Hello", 8, seed=1)
            assert found[-1]["response"]["output"][0]["content"][0]["text"] == text

    run(ask())


def test_a_response_that_streams_can_be_cancelled(make):
    async def ask():
        async with make() as client:
            body = {"input": "Hello", "max_output_tokens": 4000, "temperature": 0, "seed": 1, "stream": True}
            task = asyncio.ensure_future(client.post("/v1/responses", json=body))
            while not client.app.state.open:
                await asyncio.sleep(0.01)
            (id,) = client.app.state.open
            assert (await client.post(f"/v1/cancel/{id}")).json() == {"id": id, "cancelled": True}
            last = [line for line in (await task).text.splitlines() if line.startswith("data: ")][-1]
            assert json.loads(last.removeprefix("data: "))["response"]["id"] == id
            assert not client.app.state.open

    run(ask())


def test_limits_hold_for_states(make):
    async def ask():
        async with make(limits=Limits(states=1000)) as client:
            reply = await client.post("/v1/states", json={"prompt": "x"})
            assert reply.status_code == 507

    run(ask())


# a folder


def text_of(reply):
    assert reply.status_code == 200, reply.text
    return reply.json()["output"][0]["content"][0]["text"]


def test_servers_that_share_a_folder_share_conversations(make, llm, tmp_path):
    async def ask():
        session = llm.session()
        want = [session.say(text, 8, seed=seed) for seed, text in enumerate(("Hello", "More", "And then?"))]
        body = {"max_output_tokens": 8, "input": "Hello", "seed": 0}
        async with make(folder=tmp_path, place="anna0001") as first:
            reply = await first.post("/v1/responses", json=body)
            assert text_of(reply) == want[0]
            ids = [reply.json()["id"]]
            assert ids[0].startswith("resp_anna0001")
        # the first is gone: two others go on, in turn, and one of them has room for nothing in memory
        async with (
            make(folder=tmp_path, place="ben00001") as second,
            make(folder=tmp_path, limits=Limits(states=0)) as third,
        ):
            for client, text, seed in ((second, "More", 1), (third, "And then?", 2)):
                body |= {"input": text, "seed": seed, "previous_response_id": ids[-1]}
                reply = await client.post("/v1/responses", json=body)
                assert text_of(reply) == want[seed]
                ids.append(reply.json()["id"])
            about = [(await c.get(f"/v1/states/{ids[-1]}")).json() for c in (second, third)]
            for one in about:
                assert (one["parent"], one["text"]) == (ids[1], want[2])
            # what one forgets, all forget, also those that have it in memory
            assert (await third.delete(f"/v1/states/{ids[1]}")).json()["deleted"]
            assert (await second.get(f"/v1/states/{ids[1]}")).status_code == 404
            assert (await second.get(f"/v1/responses/{ids[2]}")).json()["parent"] == ids[1]

    run(ask())


def test_files_expire_make_room_and_are_never_reached_by_a_path(llm, tmp_path, monkeypatch):
    monkeypatch.setattr("rookery.serve.states.SWEEP", float("inf"))  # only when we say so
    store = StateStore(llm, 0, 60, folder=tmp_path / "kept")
    ids = [store.keep(llm.session(), None, "").id for _ in range(3)]
    assert len(store) == 0
    files = [store._file(id) for id in ids]
    for age, file in zip((100, 20, 10), files):
        os.utime(file, (time.time() - age,) * 2)
    with pytest.raises(ApiError, match="no state"):
        store.get(ids[0])
    assert [file.exists() for file in files] == [False, True, True]
    half = files[2].with_name(f".{files[2].name}.x.part")
    half.write_bytes(b"")
    os.utime(half, (0, 0))
    store.disk_budget = files[2].stat().st_size
    store.sweep()
    assert [file.exists() for file in (*files, half)] == [False, False, True, False]
    (tmp_path / "secret.state").write_bytes(files[2].read_bytes())
    for id in ("../secret", "state_../../secret", "..", "state_" + "0" * 24):
        with pytest.raises(ApiError, match="no state"):
            store.get(id)


def test_an_unreadable_file_counts_as_no_state_and_stays(llm, tmp_path, caplog):
    store = StateStore(llm, 0, 60, folder=tmp_path)
    file = store._file(id := store.keep(llm.session(), None, "").id)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ApiError, match="no state"):
        store.get(id)
    assert file.exists()
    assert "a kept state cannot be read" in caplog.text


def test_no_id_is_told_of_a_state_that_could_not_be_written(llm, tmp_path):
    resource = pytest.importorskip("resource", reason="limits the size of files as a full disk does")
    store, limits = StateStore(llm, 0, 60, folder=tmp_path / "kept"), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(ApiError, match="could not be kept"):
            store.keep(llm.session(), None, "")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    (tmp_path / "file").write_text("in the way")
    store = StateStore(llm, 0, 60, folder=tmp_path / "file")
    with pytest.raises(ApiError, match="could not be kept"):
        store.keep(llm.session(), None, "")


def test_a_response_can_be_held_to_a_schema(make):
    async def ask():
        async with make() as client:
            schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
            schema |= {"additionalProperties": False}
            form = {"format": {"type": "json_schema", "name": "x", "schema": schema}}
            body = {"input": "Is it?", "text": form, "seed": 1, "max_output_tokens": 100}
            answer = (await client.post("/v1/responses", json=body)).json()
            assert isinstance(json.loads(answer["output"][0]["content"][0]["text"])["ok"], bool)

    run(ask())


def test_lists_show_everybody_their_own_states(make):
    (anna, first), (ben, second) = new_key("anna"), new_key("ben")
    keys = Keys(dict(line.split(":") for line in (first, second)))

    async def ask():
        async with make(keys=keys) as client:
            hers, his = ({"Authorization": f"Bearer {key}"} for key in (anna, ben))
            made = (await client.post("/v1/states", json={"prompt": "One day"}, headers=hers)).json()
            body = {"prompt": "x", "max_tokens": 1, "keep_state": True}
            await client.post("/v1/completions", json=body, headers=his)
            for headers, count in ((hers, 1), (his, 1)):
                assert len((await client.get("/v1/states", headers=headers)).json()["data"]) == count
            # whoever was given an id may go on from it
            assert (await client.get(f"/v1/states/{made['id']}", headers=his)).status_code == 200

    run(ask())
