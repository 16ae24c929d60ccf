"""The server on a Ray cluster: replicas with all models, behind a router that leaves conversations where they are.

Ray starts, counts, watches and replaces the processes; what is said to whom is in `relay`, what is kept in `states`.
"""

import contextlib
import logging
import math
import os
import signal
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Any, NamedTuple

import ray
from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.config import AutoscalingConfig, HTTPOptions, RequestRouterConfig
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from rookery.serve.guard import answer
from rookery.serve.hosting import Limits
from rookery.serve.relay import Asked, Lost, answered, conversation_of, gathered, ranked, relay, whole
from rookery.serve.schema import ApiError

NAME = "rookery"


class Size(NamedTuple):
    """How large the cluster's part is."""

    least: int = 1
    """Replicas that are always there."""
    most: int = 1
    """Replicas when many texts are written or wait."""
    cpus: float = 1
    """Cores that Ray counts for a replica."""
    gpus: float = 0


class Replica:
    """One process with the models; `build` makes its application, given the name for its ids."""

    async def __init__(self, build: Callable[[str], FastAPI]) -> None:
        log = logging.getLogger("rookery")
        log.setLevel(logging.INFO)  # Ray leaves it to us to say where our lines go: its worker's log
        log.addHandler(logging.StreamHandler())
        self.place = serve.get_replica_context().replica_id.unique_id
        self.app = build(self.place)
        self._open = contextlib.AsyncExitStack()
        await self._open.enter_async_context(self.app.router.lifespan_context(self.app))

    async def answer(self, asked: Asked, conversation: str | None) -> AsyncGenerator[list[Message], None]:
        async for messages in answered(self.app, asked):
            yield messages

    async def count(self, asked: Asked) -> tuple[str, list[Message]]:
        """Where this is, and its answer to GET /metrics."""
        return self.place, [message async for messages in answered(self.app, asked) for message in messages]


class ByConversation(RequestRouter):
    """Asks the replica that holds the conversation, or the less busy of two; one with no row free is passed over."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        if pending_request is None or not candidate_replicas:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True  # when all are full, wait before asking all again
        conversation = pending_request.args[1]
        # without a conversation the request itself says which two are compared
        key = pending_request.metadata.internal_request_id if conversation is None else conversation
        named = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        found = [named[place] for place in ranked(key, named)]
        if conversation is None:
            return [found[:2], *([replica] for replica in found[2:])]
        return [[replica] for replica in found]


class Relayed(Response):
    """An answer that a replica writes."""

    def __init__(self, replicas: DeploymentHandle, limit: int) -> None:
        super().__init__()
        self.replicas, self.limit = replicas.options(method_name="answer", stream=True), limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            asked = await whole(scope, receive, self.limit)
        except ApiError as wrong:
            await answer(wrong, send)
            return
        if asked is not None:
            await relay(asked, self.count if asked.path == "/metrics" else self.ask, send)

    async def count(self, asked: Asked) -> AsyncGenerator[list[Message], None]:
        found = await self.replicas.broadcast("count", asked).results_async(timeout_s=5, return_exceptions=True)
        if not (there := [one for one in found if isinstance(one, tuple)]):
            raise Lost("no replica counts anything")
        yield gathered(dict(there))

    async def ask(self, asked: Asked) -> AsyncGenerator[list[Message], None]:
        found = self.replicas.remote(asked, conversation_of(asked))
        try:
            async for messages in found:
                yield messages
        except BackPressureError:
            raise ApiError(429, "every replica is busy; try again later", code="queue_full", retry=2) from None
        except (RayActorError, DeploymentUnavailableError) as gone:
            raise Lost(f"a replica is gone: {type(gone).__name__}") from None
        finally:
            found.cancel()


class Router:
    """Takes requests over HTTP and has replicas answer them; holds nothing."""

    def __init__(self, replicas: DeploymentHandle, limit: int) -> None:
        self.replicas, self.limit = replicas, limit

    async def __call__(self, request: Request) -> Response:
        return Relayed(self.replicas, self.limit)


def application(build: Callable[[str], FastAPI], limits: Limits, size: Size, drain: float) -> serve.Application:
    """What Ray Serve runs; `build` must be importable on every machine of the cluster."""
    scaled = AutoscalingConfig(
        min_replicas=size.least,
        max_replicas=size.most,
        initial_replicas=size.least,
        target_ongoing_requests=limits.rows,
    )
    replicas = serve.deployment(
        Replica,
        name="replica",
        autoscaling_config=scaled,
        max_ongoing_requests=limits.rows,  # texts wait in the router, where whoever is free first can take them
        max_queued_requests=limits.queue,
        graceful_shutdown_timeout_s=drain,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=2,
        ray_actor_options={"num_cpus": size.cpus, "num_gpus": size.gpus},
        request_router_config=RequestRouterConfig(request_router_class=ByConversation),
    )
    router = serve.deployment(
        Router,
        name="router",
        num_replicas=1 + (size.most - 1) // 8,
        max_ongoing_requests=100_000,  # the replicas say when it is enough
        graceful_shutdown_timeout_s=drain,
        graceful_shutdown_wait_loop_s=0.5,
        ray_actor_options={"num_cpus": 0},
    )
    return router.bind(replicas.bind(build), limits.body)


@contextlib.contextmanager
def running(
    build: Callable[[str], FastAPI],
    *,
    host: str,
    port: int,
    limits: Limits,
    size: Size,
    drain: float = 30.0,
    address: str | None = None,
) -> Iterator[None]:
    """The server on the cluster at `address`, or on one that is started on this machine, as long as the block runs.

    It is there when the block begins; at its end open answers get `drain` seconds.
    """
    own: dict[str, Any] = {}
    if address is None:
        # who asks for more replicas than there are cores gets them; nothing is put into the object store
        cores = max(os.cpu_count() or 1, math.ceil(size.most * size.cpus))
        own = {"num_cpus": cores, "include_dashboard": False, "object_store_memory": 100 << 20}
    ray.init(address or "local", **own)
    try:
        serve.start(proxy_location="EveryNode", http_options=HTTPOptions(host=host, port=port))
        serve.run(application(build, limits, size, drain), name=NAME, route_prefix="/")
        yield
        serve.delete(NAME, _blocking=False)
        until = time.monotonic() + drain + 10
        while NAME in serve.status().applications and time.monotonic() < until:
            time.sleep(0.2)
        if own:
            serve.shutdown()
    finally:
        ray.shutdown()


def run(build: Callable[[str], FastAPI], *, ready: Callable[[], None], **options: Any) -> None:
    """`running` until SIGTERM or Ctrl-C; `ready` is called when requests can come."""
    stop = threading.Event()
    with running(build, **options):
        for number in (signal.SIGTERM, signal.SIGINT):  # after Ray has set its own
            signal.signal(number, lambda *_: stop.set())
        ready()
        stop.wait()
