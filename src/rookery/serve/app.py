"""Puts models, routes and limits together into one ASGI application."""

import contextlib
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from starlette.exceptions import HTTPException

from rookery import __version__
from rookery.engine.llm import LLM
from rookery.engine.runners.protocol import base_of
from rookery.serve import other, responses, text
from rookery.serve.guard import Guard
from rookery.serve.hosting import Hosted, Limits
from rookery.serve.keys import Keys
from rookery.serve.metrics import Metrics
from rookery.serve.schema import ApiError

PAGE = Path(__file__).with_name("web") / "index.html"


def create_app(
    models: Mapping[str, LLM],
    *,
    limits: Limits | None = None,
    keys: Keys | None = None,
    parents: Mapping[str, str] | None = None,
    origins: Sequence[str] = (),
    folder: str | os.PathLike[str] | None = None,
    place: str = "",
) -> FastAPI:
    """The server of `models` (name -> LLM), as an ASGI application: `uvicorn.run(create_app({"m": LLM()}))`.

    With `keys` every route but the page and /health asks for one. `parents` says which of the models are adapters or
    tuned states of which. `origins` are those of web pages on other hosts that may use the server (CORS). Kept states
    are files in `folder`, which several servers may share; without one they are in memory only. `place` (lower-case
    letters and digits) names this server in the ids that it makes.
    """
    limits = limits or Limits()
    hosted = hosting(models, limits, parents or {}, None if folder is None else Path(folder), place)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        with contextlib.ExitStack() as schedulers:
            for model in hosted.values():
                if not model.shares:
                    schedulers.enter_context(model.scheduler)
            yield
            app.state.draining = True

    app = FastAPI(title="Rookery", version=__version__, description=__doc__, lifespan=lifespan)
    app.state.models, app.state.draining, app.state.metrics = hosted, False, Metrics(hosted)
    app.state.place = place
    app.state.open = {}  # id of a streamed answer -> what writes it
    for module in (text, responses, other):
        app.include_router(module.routes)

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(PAGE, headers={"Cache-Control": "no-cache", "Content-Security-Policy": POLICY})

    add_errors(app)
    app.add_middleware(Guard, state=app.state, keys=keys, body=limits.body, metrics=app.state.metrics)
    if origins:
        from starlette.middleware.cors import CORSMiddleware

        app.add_middleware(CORSMiddleware, allow_origins=list(origins), allow_methods=["*"], allow_headers=["*"])
    return app


def hosting(
    models: Mapping[str, LLM], limits: Limits, parents: Mapping[str, str], folder: Path | None, place: str
) -> dict[str, Hosted]:
    """The models by name; those that run on the same weights get one scheduler."""
    if not models:
        raise ValueError("a server needs at least one model")
    hosted: dict[str, Hosted] = {}
    for name, llm in models.items():
        same = (other.scheduler for other in hosted.values() if base_of(other.llm.runner) is base_of(llm.runner))
        shared = {"scheduler": next(same, None), "parent": parents.get(name)}
        hosted[name] = Hosted(name, llm, limits, **shared, folder=folder, place=place)
    return hosted


POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'unsafe-inline'",
        "style-src 'unsafe-inline'",
        "connect-src 'self'",
        "img-src 'self' data:",
    )
)
"""The page needs nothing from elsewhere, and is told so."""


def add_errors(app: FastAPI) -> None:
    """Every error in OpenAI's shape."""

    def shaped(wrong: ApiError) -> JSONResponse:
        headers = {"Retry-After": str(wrong.retry)} if wrong.retry is not None else None
        return JSONResponse(wrong.body(), wrong.status, headers=headers)

    @app.exception_handler(ApiError)
    async def known(_: Request, wrong: ApiError) -> JSONResponse:
        return shaped(wrong)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, wrong: RequestValidationError) -> JSONResponse:
        first = wrong.errors()[0]
        # unions name their branches, too: those say nothing to a client
        known = [str(part) for part in first["loc"][1:] if not any(mark in str(part) for mark in "[-(")]
        place = ".".join(known) or "body"
        return shaped(ApiError(400, f"{place}: {first['msg']}", param=place))

    @app.exception_handler(HTTPException)
    async def plain(_: Request, wrong: HTTPException) -> JSONResponse:
        if isinstance(wrong.__cause__, ApiError):  # FastAPI wraps what happens while it reads a body
            return shaped(wrong.__cause__)
        return shaped(ApiError(wrong.status_code, str(wrong.detail)))

    @app.exception_handler(Exception)
    async def unexpected(_: Request, wrong: Exception) -> JSONResponse:
        return shaped(ApiError(500, "something went wrong on the server; its log says what"))


def names_of(paths: Sequence[str | None]) -> list[str]:
    """A name for each model: that of its file or folder, "embedded" for the one that is shipped, numbered if equal."""
    names: list[str] = []
    for path in paths:
        name = Path(path).stem if path else "embedded"
        names.append(name if name not in names else f"{name}-{1 + sum(n.startswith(name) for n in names)}")
    return names


def serve(app: FastAPI, host: str, port: int, *, drain: float = 30.0, **options: Any) -> None:
    """Runs the application until SIGTERM or Ctrl-C; open answers get `drain` seconds to end."""
    import uvicorn

    from rookery.serve.wire import Wire

    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http=Wire,
        ws="none",
        access_log=False,
        timeout_graceful_shutdown=int(drain),
        log_level="warning",
        **options,
    )
    server = uvicorn.Server(config)
    before = server.handle_exit

    def drained(*given: Any) -> None:
        app.state.draining = True
        before(*given)

    server.handle_exit = drained
    server.run()
