"""POST /v1/responses: conversations that the server remembers. `previous_response_id` is a kept state."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from fastapi.sse import format_sse_event

from rookery.serve.hosting import Hosted, Running
from rookery.serve.prompts import conversation, form
from rookery.serve.schema import ApiError, Message, Responses
from rookery.serve.states import new_id
from rookery.serve.text import finished, hosted, state_of, streaming

routes = APIRouter(prefix="/v1", tags=["responses"])


@routes.post("/responses")
async def respond(asked: Responses, request: Request) -> Response:
    """Answers, and remembers the conversation under the answer's id."""
    model = hosted(request, asked.model)
    messages = [Message(role="user", content=asked.input)] if isinstance(asked.input, str) else list(asked.input)
    if asked.instructions:
        messages.insert(0, Message(role="system", content=asked.instructions))
    before = asked.previous_response_id or asked.state
    kept = await state_of(model, before)
    session = kept.session.fork() if kept else None
    prompt = conversation(model.llm, messages, goes_on=before is not None)
    limit = asked.max_output_tokens or model.limits.max_tokens
    stops = (*(asked.stop or ()), *prompt.stops)
    more = {"stop": stops, "grammar": form(asked.text.format.response_format()), **asked.options()}
    running = model.submit(await model.ids(prompt.text), limit, session, seed=asked.seed, **more)
    answer = Answer(model, asked, running, request.app.state.place)
    if asked.stream:
        return streaming(request, answer.id, answer.events(), [running])
    (text,) = await finished(request, [running])
    return JSONResponse(await answer.done(text.strip()))


@routes.get("/responses/{id}")
async def remembered(id: str, request: Request) -> Response:
    """What is kept of an answer."""
    for model in request.app.state.models.values():
        try:
            kept = await state_of(model, id)
        except ApiError:
            continue
        return JSONResponse({"id": id, "object": "response", "model": model.name, **kept.about(model.states.expiry)})
    raise unknown_response(id)


@routes.delete("/responses/{id}")
async def forgotten(id: str, request: Request) -> Response:
    """Forgets an answer and the state after it."""
    for model in request.app.state.models.values():
        with contextlib.suppress(ApiError):
            await asyncio.to_thread(model.states.remove, id)
            return JSONResponse({"id": id, "object": "response", "deleted": True})
    raise unknown_response(id)


def unknown_response(id: str) -> ApiError:
    return ApiError(404, f"no response {id[:80]!r} is kept", code="no_state")


class Answer:
    """One response, whole or as the events that OpenAI's clients expect."""

    def __init__(self, model: Hosted, asked: Responses, running: Running, place: str) -> None:
        self.model, self.asked, self.running = model, asked, running
        self.id, self.item = new_id("resp_", place), new_id("msg_", place)
        self.created = int(time.time())

    def body(self, status: str, output: list[dict[str, Any]]) -> dict[str, Any]:
        """The response object."""
        reason = self.running.finish_reason if status != "in_progress" else None
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "model": self.model.name,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if reason == "length" else None,
            "instructions": self.asked.instructions,
            "previous_response_id": self.asked.previous_response_id,
            "output": output,
            "parallel_tool_calls": False,
            "tool_choice": "none",
            "tools": [],
            "store": self.asked.store,
            "temperature": self.asked.temperature,
            "top_p": self.asked.top_p,
            "usage": None if status == "in_progress" else self.usage(),
        }

    def usage(self) -> dict[str, Any]:
        running = self.running
        return {
            "input_tokens": running.prompt_tokens,
            "input_tokens_details": {"cached_tokens": running.generation.cached},
            "output_tokens": running.tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": running.prompt_tokens + running.tokens,
        }

    def message(self, text: str, status: str) -> dict[str, Any]:
        """The one item of the output."""
        part = {"type": "output_text", "text": text, "annotations": []}
        return {"id": self.item, "type": "message", "role": "assistant", "status": status, "content": [part]}

    async def done(self, text: str) -> dict[str, Any]:
        """The finished response; its state is kept unless that was not wanted."""
        session = self.running.generation.session
        if self.asked.store and session is not None:
            before = self.asked.previous_response_id or self.asked.state
            await asyncio.to_thread(self.model.states.keep, session, before, text, self.id)
        status = "incomplete" if self.running.finish_reason == "length" else "completed"
        return self.body(status, [self.message(text, status)])

    async def events(self) -> AsyncIterator[bytes]:
        """The stream of events, numbered."""
        number = 0

        def event(kind: str, **what: Any) -> bytes:
            nonlocal number
            data = {"type": kind, "sequence_number": number, **what}
            number += 1
            return format_sse_event(data_str=json.dumps(data, ensure_ascii=False), event=kind)

        place = {"item_id": self.item, "output_index": 0, "content_index": 0}
        text = ""
        try:
            yield event("response.created", response=self.body("in_progress", []))
            item = {**self.message("", "in_progress"), "content": []}
            yield event("response.output_item.added", output_index=0, item=item)
            part = {"type": "output_text", "text": "", "annotations": []}
            yield event("response.content_part.added", **place, part=part)
            async for piece in self.running.pieces():
                shown = piece if text else piece.lstrip()
                text += shown
                if shown:
                    yield event("response.output_text.delta", **place, delta=shown, logprobs=[])
            whole = await self.done(text)
            yield event("response.output_text.done", **place, text=text, logprobs=[])
            yield event("response.content_part.done", **place, part=whole["output"][0]["content"][0])
            yield event("response.output_item.done", output_index=0, item=whole["output"][0])
            yield event(f"response.{whole['status']}", response=whole)
        except ApiError as wrong:
            yield event("error", code=wrong.code, message=wrong.message, param=wrong.param)
