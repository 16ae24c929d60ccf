"""Between those who ask and several servers that share a folder of states: who answers, and what if he dies.

Any server can answer anything, because a state that it does not hold it reads from the folder. A conversation stays
where it is only so that nothing is read twice. This file knows no cluster; `cluster` gives it one.
"""

import asyncio
import contextlib
import hashlib
import json
import logging
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from typing import NamedTuple

from fastapi.sse import format_sse_event
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rookery.serve.guard import answer, too_large
from rookery.serve.schema import ApiError
from rookery.serve.wire import PATIENCE

log = logging.getLogger("rookery")

ATTEMPTS = 3
"""Servers that are asked, one after the other, until one begins to answer."""
RANDOM = 24
"""Digits at the end of an id that say nothing; what stands between the kind and them is the place that made it."""


class Asked(NamedTuple):
    """A request, whole."""

    method: str
    path: str
    query: bytes
    headers: list[tuple[bytes, bytes]]
    body: bytes


class Lost(Exception):
    """The server that was to answer is gone."""


def conversation_of(asked: Asked) -> str | None:
    """What requests of one conversation have in common, None where nothing tells.

    The id of a state, a response or an open stream, or else what the client calls the conversation or its user, or else
    the beginning of the conversation, up to the first words of the user.
    """
    parts = asked.path.strip("/").split("/")
    if len(parts) >= 3 and parts[1] in ("states", "responses", "cancel"):
        return parts[2]
    try:
        body = json.loads(asked.body or b"{}")
        for name in ("previous_response_id", "state", "prompt_cache_key", "user"):
            if isinstance(value := body.get(name), str) and value:
                return value
        turns = body.get("messages") or []
        first = next((i for i, turn in enumerate(turns) if turn["role"] == "user"), None)
        return None if first is None else json.dumps([body.get("model"), turns[: first + 1]])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None  # whoever answers says what is wrong with it


def place_of(id: str) -> str:
    """The place in an id, "" where it names none."""
    return id.rpartition("_" if "_" in id else "-")[2][:-RANDOM]


def ranked(conversation: str, places: Iterable[str]) -> list[str]:
    """The places, the one that should answer first.

    Where the conversation was last, or else, and after it, in an order that is the conversation's own: when a place is
    gone its conversations scatter over all others, and when one is new no other conversation moves.
    """
    home = place_of(conversation)

    def rank(place: str) -> tuple[bool, bytes]:
        # clients may send half characters, which have no bytes
        return place != home, hashlib.sha256(f"{place} {conversation}".encode(errors="replace")).digest()

    return sorted(places, key=rank)


async def whole(scope: Scope, receive: Receive, limit: int, patience: float = PATIENCE) -> Asked | None:
    """The request with its body, None if the client went away.

    ApiError 413 for more than `limit` bytes, 408 for a client that takes more than `patience` seconds to send them.
    """
    body = bytearray()
    try:
        async with asyncio.timeout(patience):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return None
                body += message.get("body", b"")
                if len(body) > limit:
                    raise too_large(limit)
                if not message.get("more_body"):
                    break
    except TimeoutError:
        raise ApiError(408, f"the request was not complete after {patience:g} s; send it at once") from None
    headers = [(bytes(name), bytes(value)) for name, value in scope["headers"]]
    return Asked(scope["method"], scope["path"], scope["query_string"], headers, bytes(body))


async def answered(app: ASGIApp, asked: Asked) -> AsyncGenerator[list[Message], None]:
    """What an application in this process answers, as many messages at a time as are there.

    Whoever stops listening is, to the application, a client that goes away.
    """
    given = [{"type": "http.request", "body": asked.body, "more_body": False}]
    messages: asyncio.Queue[Message | None] = asyncio.Queue()

    async def receive() -> Message:
        return given.pop() if given else await asyncio.get_running_loop().create_future()

    async def send(message: Message) -> None:
        messages.put_nowait(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "scheme": "http",
        "method": asked.method,
        "path": asked.path,
        "raw_path": asked.path.encode(),
        "query_string": asked.query,
        "root_path": "",
        "headers": asked.headers,
        "client": None,
        "server": None,
    }
    work = asyncio.ensure_future(app(scope, receive, send))
    work.add_done_callback(lambda _: messages.put_nowait(None))
    try:
        over = False
        while not over:
            found = [await messages.get()]
            while not messages.empty():
                found.append(messages.get_nowait())
            over = found[-1] is None
            if ready := [message for message in found if message is not None]:
                yield ready
        if not work.cancelled() and (
            error := work.exception()
        ):  # the client has its answer, which says that something went wrong
            log.error("a request failed", exc_info=error)
    finally:
        work.cancel()


async def relay(asked: Asked, ask: Callable[[Asked], AsyncGenerator[list[Message], None]], send: Send) -> None:
    """Sends on what a server answers. `ask` chooses one and raises Lost when it is gone, ApiError when none has room.

    A server that is lost before it begins to answer is replaced by another: nobody notices. States are never changed,
    so it does no harm if it had answered in part. One that is lost in the middle of a stream leaves a last event that
    says so; the conversation is where it was before the request, which can be sent again.
    """
    headers: dict[bytes, bytes] | None = None
    for _ in range(ATTEMPTS):
        try:
            async with contextlib.aclosing(ask(asked)) as found:  # a client that goes away ends it now, not some day
                async for messages in found:
                    for message in messages:
                        if message["type"] == "http.response.start":
                            headers = {name.lower(): value for name, value in message["headers"]}
                        await send(message)
            return
        except Lost as lost:
            log.warning("%s %s: %s", asked.method, asked.path, lost)
            if headers is not None:
                break
        except ApiError as wrong:
            await answer(wrong, send)
            return
    wrong = ApiError(
        503,
        "the server that wrote this answer is gone; no conversation is lost: ask again",
        code="replica_lost",
        retry=1,
    )
    if headers is None:
        await answer(wrong, send)
    elif headers.get(b"content-type", b"").startswith(b"text/event-stream"):
        await send({"type": "http.response.body", "body": last_event(asked.path, wrong), "more_body": False})
    else:  # half a file must not look whole
        raise Lost("an answer was cut")


def gathered(answers: Mapping[str, list[Message]]) -> list[Message]:
    """One answer from those of all places to GET /metrics: every sample tells its `replica`. A refusal stays one."""
    refused = [found for found in answers.values() if found[0]["status"] != 200]
    if refused:
        return refused[0]
    kinds: dict[str, list[str]] = {}
    for place, (_, *parts) in answers.items():
        kind = ""
        for line in b"".join(part.get("body", b"") for part in parts).decode().splitlines():
            if line.startswith("# HELP"):
                kind = line
            elif line.startswith("#"):
                kind = f"{kind}\n{line}"
                kinds.setdefault(kind, [])
            else:
                kinds[kind].append(line.replace("{", f'{{replica="{place}",', 1))  # all of ours have labels
    body = "".join(f"{line}\n" for kind, samples in kinds.items() for line in (kind, *samples)).encode()
    (start, *_) = next(iter(answers.values()))
    headers = [(name, value) for name, value in start["headers"] if name.lower() != b"content-length"]
    headers.append((b"content-length", str(len(body)).encode()))
    return [start | {"headers": headers}, {"type": "http.response.body", "body": body}]


def last_event(path: str, wrong: ApiError) -> bytes:
    """The error as the end of a stream, in the form of the route."""
    if path.endswith("/responses"):
        told = {"type": "error", "code": wrong.code, "message": wrong.message, "param": None}
        return format_sse_event(data_str=json.dumps(told), event="error")
    return format_sse_event(data_str=json.dumps(wrong.body()))
