"""HTTP as it comes over a socket: clients that never finish a request are told so and cut off."""

import asyncio
import json
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from rookery.serve.schema import ApiError

PATIENCE = 30.0
"""Seconds that a client has for a whole request, its head and its body."""


class Wire(H11Protocol):
    """uvicorn's protocol, with a time by which a request must be there, and errors in OpenAI's shape."""

    patience = PATIENCE
    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unwatch()
        super().connection_lost(exc)

    def _watch(self) -> None:
        """Runs the clock while a request is incomplete: once begun, further bytes do not set it back."""
        if self.conn.their_state not in (h11.IDLE, h11.SEND_BODY) or self.transport.is_closing():
            self._unwatch()
        elif self._late is None:
            self._late = self.loop.call_later(self.patience, self._give_up)

    def _unwatch(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _give_up(self) -> None:
        self._late = None
        if self.transport.is_closing():
            return
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):  # nothing was answered yet
            self._refuse(408, f"the request was not complete after {self.patience:g} s; send it at once")
        self.transport.close()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, "this is no valid HTTP request")
        self.transport.close()

    def _refuse(self, status: int, why: str) -> None:
        body = json.dumps(ApiError(status, why).body()).encode()
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        for event in (h11.Response(status_code=status, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
