"""Routes that write no text: models, embeddings, kept states, health and metrics."""

import asyncio
import base64
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from starlette.background import BackgroundTask

from rookery.engine.score import vectors
from rookery.engine.session import END_OF_TEXT
from rookery.serve.hosting import Hosted
from rookery.serve.schema import ApiError, Embeddings, NewState, Rewind
from rookery.serve.text import finished, hosted, state_of
from rookery.serve.watching import norms

TEXTS = 2048
"""Texts of one request for embeddings."""
SIDE_BY_SIDE = 32
"""Of them in the queue at a time, so that others find room there."""

routes = APIRouter(tags=["other"])


@routes.get("/v1/models")
async def models(request: Request) -> dict[str, Any]:
    """What is served."""
    return {"object": "list", "data": [described(model) for model in request.app.state.models.values()]}


@routes.get("/v1/models/{name}")
async def model(name: str, request: Request) -> dict[str, Any]:
    """One model."""
    return described(hosted(request, name))


def described(model: Hosted) -> dict[str, Any]:
    """OpenAI's description, with what a recurrent model has besides."""
    runner = model.llm.runner
    try:
        chats = bool(model.llm.template)
    except ValueError:
        chats = False
    return {
        "id": model.name,
        "object": "model",
        "created": 0,
        "owned_by": "rookery",
        "parent": model.parent,
        "family": runner.family,
        "runner": runner.name,
        "chat": chats,
        "state_bytes": runner.init_state().nbytes,
    }


@routes.post("/v1/embeddings")
async def embeddings(asked: Embeddings, request: Request) -> Response:
    """A vector of length 1 for each text, from the model's state after it."""
    model = hosted(request, asked.model)
    several = isinstance(asked.input, list) and asked.input and isinstance(asked.input[0], str | list)
    texts = list(asked.input) if several else [asked.input]
    if len(texts) > TEXTS:
        raise ApiError(400, f"input takes up to {TEXTS} texts at a time, got {len(texts)}", param="input")
    found: list[np.ndarray] = []
    count = 0
    for start in range(0, len(texts), SIDE_BY_SIDE):
        running = []
        try:
            for text in texts[start : start + SIDE_BY_SIDE]:
                ids = await asyncio.to_thread(model.llm.tokens_of, text)
                count += len(ids)
                # a session of its own: texts that are only looked at are no beginnings to be kept
                running.append(model.submit([END_OF_TEXT, *ids], 0, model.llm.session()))
            await finished(request, running)
            found.extend(vectors(model.llm, [one.generation.session.state for one in running]))
        except ValueError as wrong:
            raise ApiError(400, str(wrong), param="input") from None
        finally:
            for one in running:
                one.generation.cancel()
    data = [
        {"object": "embedding", "index": i, "embedding": _encoded(vector, asked.encoding_format)}
        for i, vector in enumerate(found)
    ]
    told = {"object": "list", "model": model.name, "data": data}
    return JSONResponse(told | {"usage": {"prompt_tokens": count, "total_tokens": count}})


def _encoded(vector: np.ndarray, form: str) -> Any:
    if form == "base64":  # what OpenAI's own client asks for
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return vector.tolist()


# kept states


@routes.post("/v1/states")
async def new_state(asked: NewState, request: Request) -> dict[str, Any]:
    """Reads a text, from the beginning or from a kept state, and keeps where it ends."""
    model = hosted(request, asked.model)
    before = await state_of(model, asked.state)
    session = before.session.fork() if before else None
    if len(asked.prompt):
        running = model.submit(await model.ids(asked.prompt), 0, session)
        await finished(request, [running])
        session = running.generation.session
    text = asked.prompt if isinstance(asked.prompt, str) else ""
    kept = await asyncio.to_thread(model.states.keep, session or model.llm.session(), asked.state, text)
    return kept.about(model.states.expiry)


@routes.get("/v1/states")
async def all_states(request: Request, model: str | None = None) -> dict[str, Any]:
    """Every kept state: with their parents a tree."""
    found = hosted(request, model).states
    return {"object": "list", "data": [kept.about(found.expiry) for kept in found.all()], "bytes": found.nbytes}


@routes.get("/v1/states/{id}")
async def one_state(id: str, request: Request, model: str | None = None) -> dict[str, Any]:
    """One kept state."""
    found = hosted(request, model).states
    return (await asyncio.to_thread(found.get, id)).about(found.expiry)


@routes.get("/v1/states/{id}/picture")
async def state_picture(id: str, request: Request, model: str | None = None) -> dict[str, Any]:
    """Norms of the recurrent state, [layers][heads]."""
    kept = await asyncio.to_thread(hosted(request, model).states.get, id)
    return {"norms": norms(kept.session.state)}


@routes.post("/v1/states/{id}/fork")
async def fork(id: str, request: Request, model: str | None = None) -> dict[str, Any]:
    """The same state under another id, with an expiry of its own."""
    found = hosted(request, model).states
    kept = await asyncio.to_thread(found.get, id)
    return (await asyncio.to_thread(found.keep, kept.session, id, "")).about(found.expiry)


@routes.post("/v1/states/{id}/rewind")
async def rewind(id: str, asked: Rewind, request: Request, model: str | None = None) -> dict[str, Any]:
    """The nearest ancestor that has read at most so many tokens."""
    found = hosted(request, model).states
    return (await asyncio.to_thread(found.ancestor, id, asked.tokens_seen)).about(found.expiry)


@routes.get("/v1/states/{id}/file")
async def export(id: str, request: Request, model: str | None = None) -> Response:
    """The state as a file, to be imported here or elsewhere, or read by `rookery generate --state`."""
    found = hosted(request, model).states
    folder = Path(tempfile.mkdtemp(prefix="rookery-"))
    path = await asyncio.to_thread(found.export, id, folder)

    def tidy() -> None:
        path.unlink(missing_ok=True)
        folder.rmdir()

    return FileResponse(path, filename="conversation.state", background=BackgroundTask(tidy))


@routes.post("/v1/states/import")
async def load_state(request: Request, model: str | None = None) -> dict[str, Any]:
    """Keeps the state in the body, a file that `export` or a session wrote for the same model."""
    found = hosted(request, model).states
    body = await request.body()
    with tempfile.TemporaryDirectory(prefix="rookery-") as folder:
        path = Path(folder) / "given.state"
        path.write_bytes(body)
        return (await asyncio.to_thread(found.load, path)).about(found.expiry)


@routes.delete("/v1/states/{id}")
async def forget(id: str, request: Request, model: str | None = None) -> dict[str, Any]:
    """Forgets a state; those that came from it stay."""
    await asyncio.to_thread(hosted(request, model).states.remove, id)
    return {"id": id, "object": "state", "deleted": True}


# the server itself


@routes.get("/health")
async def health(request: Request) -> Response:
    """200 while requests are taken, 503 while the server drains."""
    draining = request.app.state.draining
    return JSONResponse({"status": "draining" if draining else "ok"}, 503 if draining else 200)


@routes.get("/metrics")
async def metrics(request: Request) -> Response:
    """Counters in Prometheus' form."""
    from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

    return Response(generate_latest(request.app.state.metrics.registry), media_type=CONTENT_TYPE_LATEST)
