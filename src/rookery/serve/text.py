"""POST /v1/completions and /v1/chat/completions."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from fastapi.sse import EventSourceResponse, format_sse_event

from rookery.engine.session import Session
from rookery.serve.hosting import Hosted, Running, usage
from rookery.serve.prompts import Prompt, chat_prompt, form, may_be_call, tool_calls
from rookery.serve.schema import ApiError, Chat, Completion, Sampled
from rookery.serve.states import Kept, new_id
from rookery.serve.watching import Progress

routes = APIRouter(prefix="/v1", tags=["text"])


def hosted(request: Request, name: str | None) -> Hosted:
    """The model of that name; the first one where none is named."""
    models: dict[str, Hosted] = request.app.state.models
    if name is None:
        return next(iter(models.values()))
    if name not in models:
        raise ApiError(
            404, f"no model {name[:80]!r}; there are: {', '.join(models)}", param="model", code="model_not_found"
        )
    return models[name]


async def state_of(model: Hosted, id: str | None) -> Kept | None:
    """The kept state of that id, if one is asked for; it may have to be read from the disk."""
    return await asyncio.to_thread(model.states.get, id) if id else None


def start(
    model: Hosted, asked: Sampled, before: Kept | None, prompt: Any, limit: int | None, number: int, **more: Any
) -> Running:
    """Hands answer `number` of a request, which goes on from `before`, to the scheduler."""
    session: Session | None = before.session.fork() if before else None
    seed = None if asked.seed is None else asked.seed + number
    limit = model.limits.max_tokens if limit is None else limit
    watched = asked.watch and asked.stream and number == 0
    return model.submit(prompt, limit, session, watched=watched, seed=seed, **asked.options(), **more)


async def finished(request: Request, running: Sequence[Running]) -> list[str]:
    """The texts of all of them; when the client goes away, they are ended at once."""
    texts = asyncio.gather(*(one.text() for one in running))
    texts.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody may be left to ask for it
    watch = asyncio.ensure_future(gone(request))
    try:
        await asyncio.wait({texts, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not texts.done():
            raise ApiError(499, "the client has gone")
        return await texts
    finally:
        watch.cancel()
        if not texts.done():
            texts.cancel()
        for one in running:
            one.generation.cancel()


async def gone(request: Request) -> None:
    """Returns when the client has closed its connection."""
    while True:
        if (await request.receive())["type"] == "http.disconnect":
            return


def streaming(request: Request, id: str, events: AsyncIterator[bytes], running: Sequence[Running]) -> Response:
    """Server-sent events; while they flow, the answer can be cancelled by its id."""
    open_: dict[str, Sequence[Running]] = request.app.state.open
    open_[id] = running

    async def watched() -> AsyncIterator[bytes]:
        try:
            async for event in events:
                yield event
        finally:
            open_.pop(id, None)
            for one in running:
                one.generation.cancel()

    return EventSourceResponse(watched(), headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})


def events(request: Request, id: str, chunks: AsyncIterator[dict[str, Any]], running: Sequence[Running]) -> Response:
    """The chunks as server-sent events; an error in the middle is one, too."""

    async def lines() -> AsyncIterator[bytes]:
        try:
            async for chunk in chunks:
                yield format_sse_event(data_str=json.dumps(chunk, ensure_ascii=False))
            yield format_sse_event(data_str="[DONE]")
        except ApiError as wrong:
            yield format_sse_event(data_str=json.dumps(wrong.body()))
        except Exception:
            broken = ApiError(500, "the answer could not be finished; the server's log says why")
            yield format_sse_event(data_str=json.dumps(broken.body()))
            raise

    return streaming(request, id, lines(), running)


async def merged(running: Sequence[Running]) -> AsyncIterator[tuple[int, str | Progress | None]]:
    """(number, event) of several texts as they come; (number, None) at the end of each."""
    queue: asyncio.Queue[Any] = asyncio.Queue()

    async def follow(number: int, one: Running) -> None:
        try:
            async for event in one.events():
                queue.put_nowait((number, event))
            queue.put_nowait((number, None))
        except Exception as error:
            queue.put_nowait(error)

    tasks = [asyncio.ensure_future(follow(i, one)) for i, one in enumerate(running)]
    open_ = len(running)
    try:
        while open_:
            found = await queue.get()
            if isinstance(found, Exception):
                raise found
            open_ -= found[1] is None
            yield found
    finally:
        for task in tasks:
            task.cancel()


async def kept(model: Hosted, asked: Sampled, one: Running, text: str) -> Kept | None:
    """Keeps the state after an answer, where that was asked for."""
    if not asked.keep_state or one.generation.session is None:
        return None
    return await asyncio.to_thread(model.states.keep, one.generation.session, asked.state, text)


def token_text(model: Hosted, token: int) -> str:
    return model.llm.tokenizer.token_bytes(token).decode("utf-8", "replace")


@routes.post("/cancel/{id}")
async def cancel(id: str, request: Request) -> dict[str, Any]:
    """Ends a streamed answer where it is; its last chunk comes as if it had ended by itself, with its state."""
    for one in request.app.state.open.get(id, ()):
        one.generation.cancel()
    return {"id": id, "cancelled": id in request.app.state.open}


# completions


@routes.post("/completions")
async def completions(asked: Completion, request: Request) -> Response:
    """Continues texts."""
    model = hosted(request, asked.model)
    prompts = prompts_of(asked)
    words = [await model.ids(prompt) for prompt in prompts]
    more = {"stop": asked.stop or (), "grammar": form(asked.response_format), "logprobs": asked.logprobs}
    limit = 16 if asked.max_tokens is None else asked.max_tokens
    before = await state_of(model, asked.state)
    running = started(
        lambda i: start(model, asked, before, words[i // asked.n], limit, i % asked.n, **more),
        len(prompts) * asked.n,
    )
    head = {"id": new_id("cmpl-", request.app.state.place), "object": "text_completion", "created": int(time.time())}
    head["model"] = model.name
    echoes = [prompt if asked.echo and isinstance(prompt, str) else "" for prompt in prompts for _ in range(asked.n)]
    if asked.stream:
        return events(request, head["id"], completion_chunks(model, asked, running, head, echoes), running)
    texts = await finished(request, running)
    choices = [
        {
            "index": i,
            "text": echo + text,
            "finish_reason": one.finish_reason,
            "logprobs": completion_logprobs(model, one),
        }
        for i, (one, text, echo) in enumerate(zip(running, texts, echoes))
    ]
    for choice, one, text in zip(choices, running, texts):
        if state := await kept(model, asked, one, text):
            choice["state"] = state.about(model.states.expiry)
    return JSONResponse(head | {"choices": choices, "usage": usage(running)})


def prompts_of(asked: Completion) -> list[Any]:
    """The prompts of a request, each text or token ids."""
    prompt = asked.prompt
    several = isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list)
    prompts = list(prompt) if several else [prompt]
    if len(prompts) * asked.n > 128:
        raise ApiError(400, f"{len(prompts)} prompts times n = {asked.n} are more than 128 texts", param="n")
    # an empty prompt is the beginning of a text
    return [one if len(one) or asked.state else [0] for one in prompts]


def started(make: Any, count: int) -> list[Running]:
    """`count` texts, or none: what was begun is ended where the queue has no room for all."""
    running: list[Running] = []
    try:
        for i in range(count):
            running.append(make(i))
    except ApiError:
        for one in running:
            one.generation.cancel()
        raise
    return running


async def completion_chunks(
    model: Hosted, asked: Completion, running: list[Running], head: dict[str, Any], echoes: list[str]
) -> AsyncIterator[dict[str, Any]]:
    told = [""] * len(running)
    for i, echo in enumerate(echoes):
        if echo:
            yield head | {"choices": [{"index": i, "text": echo, "finish_reason": None, "logprobs": None}]}
    async for i, piece in merged(running):
        if isinstance(piece, Progress):
            yield head | piece.chunk()
            continue
        one = running[i]
        logprobs = completion_logprobs(model, one)
        choice: dict[str, Any] = {"index": i, "text": piece or "", "finish_reason": None, "logprobs": logprobs}
        told[i] += piece or ""
        if piece is None:
            choice["finish_reason"] = one.finish_reason
            if state := await kept(model, asked, one, told[i]):
                choice["state"] = state.about(model.states.expiry)
        yield head | {"choices": [choice]}
    if asked.stream_options and asked.stream_options.include_usage:
        yield head | {"choices": [], "usage": usage(running)}


def completion_logprobs(model: Hosted, one: Running) -> dict[str, Any] | None:
    """OpenAI's older form: parallel lists."""
    told = one.fresh_logprobs()
    if not told:
        return None
    return {
        "tokens": [token_text(model, t.token) for t in told],
        "token_logprobs": [t.logprob for t in told],
        "top_logprobs": [{token_text(model, token): p for token, p in t.top} for t in told],
    }


# chat


@routes.post("/chat/completions")
async def chat(asked: Chat, request: Request) -> Response:
    """Answers in a conversation."""
    model = hosted(request, asked.model)
    prompt = chat_prompt(model.llm, asked, goes_on=asked.state is not None)
    more = {
        "stop": (*(asked.stop or ()), *prompt.stops),
        "grammar": prompt.grammar,
        "logprobs": asked.top_logprobs if asked.logprobs else None,
    }
    limit = asked.max_tokens if asked.max_completion_tokens is None else asked.max_completion_tokens
    before = await state_of(model, asked.state)
    words = await model.ids(prompt.text)
    running = started(lambda i: start(model, asked, before, words, limit, i, **more), asked.n)
    head = {"id": new_id("chatcmpl-", request.app.state.place), "created": int(time.time()), "model": model.name}
    if asked.stream:
        return events(request, head["id"], chat_chunks(model, asked, prompt, running, head), running)
    texts = await finished(request, running)
    choices = []
    for i, (one, text) in enumerate(zip(running, texts)):
        message, reason = said(prompt, text, one)
        choice = {"index": i, "message": message, "finish_reason": reason, "logprobs": chat_logprobs(model, one)}
        if state := await kept(model, asked, one, text):
            choice["state"] = state.about(model.states.expiry)
        choices.append(choice)
    return JSONResponse(head | {"object": "chat.completion", "choices": choices, "usage": usage(running)})


def said(prompt: Prompt, text: str, one: Running) -> tuple[dict[str, Any], str]:
    """The assistant's message and why it ended."""
    if prompt.calls and (calls := tool_calls(text)):
        return {"role": "assistant", "content": None, "tool_calls": calls}, "tool_calls"
    return {"role": "assistant", "content": text.strip()}, one.finish_reason


async def chat_chunks(
    model: Hosted, asked: Chat, prompt: Prompt, running: list[Running], head: dict[str, Any]
) -> AsyncIterator[dict[str, Any]]:
    head = head | {"object": "chat.completion.chunk"}
    told = [""] * len(running)

    def chunk(i: int, delta: dict[str, Any], reason: str | None = None, **more: Any) -> dict[str, Any]:
        return head | {"choices": [{"index": i, "delta": delta, "finish_reason": reason, **more}]}

    for i in range(len(running)):
        yield chunk(i, {"role": "assistant", "content": "" if not prompt.calls else None})
    async for i, piece in merged(running):
        if isinstance(piece, Progress):
            yield head | piece.chunk()
            continue
        one = running[i]
        if piece is not None:
            shown = piece if told[i] else piece.lstrip()  # an answer begins with the space after the speaker's colon
            told[i] += shown
            if shown and not (prompt.calls and may_be_call(told[i])):
                yield chunk(i, {"content": shown}, logprobs=chat_logprobs(model, one))
            continue
        message, reason = said(prompt, told[i], one)
        delta: dict[str, Any] = {}
        if prompt.calls and message.get("tool_calls"):
            delta = {"tool_calls": [{"index": 0, **message["tool_calls"][0]}]}
        elif prompt.calls and may_be_call(told[i]):
            delta = {"content": told[i]}
        state = await kept(model, asked, one, told[i])
        yield chunk(i, delta, reason, **({"state": state.about(model.states.expiry)} if state else {}))
    if asked.stream_options and asked.stream_options.include_usage:
        yield head | {"choices": [], "usage": usage(running)}


def chat_logprobs(model: Hosted, one: Running) -> dict[str, Any] | None:
    """OpenAI's form: a list of tokens, each with the likeliest."""

    def described(token: int, logprob: float) -> dict[str, Any]:
        piece = model.llm.tokenizer.token_bytes(token)
        return {"token": piece.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(piece)}

    told = one.fresh_logprobs()
    if not told:
        return None
    return {
        "content": [described(t.token, t.logprob) | {"top_logprobs": [described(*top) for top in t.top]} for t in told]
    }
