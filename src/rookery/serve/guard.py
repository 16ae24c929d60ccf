"""What stands before every route, as plain ASGI: keys, the size of bodies, draining, counting, the access log."""

import json
import logging
import time
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rookery.serve.keys import CALLER, Keys
from rookery.serve.metrics import Metrics
from rookery.serve.schema import ApiError

log = logging.getLogger("rookery.access")

OPEN = frozenset({"/", "/health", "/favicon.ico"})
"""Paths that need no key."""


class Guard:
    """Turns away who may not come in, and writes down who came: one JSON object a line, without prompts or keys."""

    def __init__(self, app: ASGIApp, *, state: Any, keys: Keys | None, body: int, metrics: Metrics) -> None:
        self.app, self.state, self.keys, self.body, self.metrics = app, state, keys, body, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status, who = time.perf_counter(), 0, None

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            try:
                who = self.check(scope)
                CALLER.set(who)
                await self.app(scope, self.bounded(receive), counted)
            except ApiError as wrong:
                if status == 0:
                    await answer(wrong, counted)
        finally:
            seconds = time.perf_counter() - began
            # the route's pattern, not the path: ids would make a counter for each
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(route, str(status or 499)).inc()
            self.metrics.seconds.labels(route).observe(seconds)
            line = {"method": scope["method"], "route": route, "status": status or 499, "seconds": round(seconds, 3)}
            log.info(json.dumps(line | ({"key": who} if who else {})))

    def check(self, scope: Scope) -> str | None:
        """The name of the key; ApiError for a request that is not let in."""
        headers = dict(scope["headers"])
        if self.state.draining and scope["path"] not in ("/health", "/metrics"):
            raise ApiError(503, "the server is shutting down; ask again in a moment", code="draining", retry=5)
        size = headers.get(b"content-length", b"0")
        if not size.isdigit():
            raise ApiError(400, "the length of the body must be a number")
        if int(size) > self.body:
            raise too_large(self.body)
        if self.keys is None or scope["path"] in OPEN:
            return None
        kind, _, given = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
        who = self.keys.owner(given.strip()) if kind.lower() == "bearer" else None
        if who is None:
            raise ApiError(401, "a valid API key is needed: Authorization: Bearer KEY", code="invalid_api_key")
        return who

    def bounded(self, receive: Receive) -> Receive:
        """`receive` that gives up on a body that grows beyond the limit."""
        got = 0

        async def limited() -> Message:
            nonlocal got
            message = await receive()
            if message["type"] == "http.request":
                got += len(message.get("body", b""))
                if got > self.body:
                    raise too_large(self.body)
            return message

        return limited


def too_large(limit: int) -> ApiError:
    return ApiError(413, f"the body is larger than {limit} bytes; send less", code="too_large")


async def answer(wrong: ApiError, send: Send) -> None:
    """The error as an answer."""
    body = json.dumps(wrong.body()).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if wrong.retry is not None:
        headers.append((b"retry-after", str(wrong.retry).encode()))
    await send({"type": "http.response.start", "status": wrong.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
