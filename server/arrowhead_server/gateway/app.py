# SPDX-License-Identifier: Apache-2.0
"""The FastAPI application: all dialects, health, metrics, and a gate in front of them."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any, Generic, TypeVar

from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.security import HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException

from arrowhead_client import ArrowheadError, AsyncClient, InvalidInput, ServerError
from arrowhead_client._tracing import unseen
from arrowhead_server.gateway import failures, openai, page, tei, triton
from arrowhead_server.gateway.access import METADATA, Access
from arrowhead_server.gateway.asking import Asking
from arrowhead_server.gateway.bodies import MB, Bodies
from arrowhead_server.gateway.call import CALL, EVENTS
from arrowhead_server.gateway.embedder import PART_TEXTS
from arrowhead_server.gateway.gate import Gate
from arrowhead_server.gateway.metrics import Metrics
from arrowhead_server.gateway.rates import Rates
from arrowhead_server.gateway.settings import Settings
from arrowhead_server.gateway.spans import Spans
from arrowhead_server.gateway.web import json

T = TypeVar("T")
_LOG = logging.getLogger(__name__)
_PROBES = itertools.count()
_PROBED_S = 1.0
# What pages of other origins may read of an answer.
_SHOWN = (
    "RateLimit-Limit",
    "RateLimit-Remaining",
    "RateLimit-Reset",
    "Retry-After",
    "WWW-Authenticate",
    "X-Request-Id",
    "x-compute-tokens",
    "x-truncated",
)


def create_app(settings: Settings) -> FastAPI:
    """The application; it connects when it is started.

    Raises:
        BadSetting: keys, tokens' keys, or the rate cannot be read.
    """
    access, metrics, spans = Access(settings), Metrics(), Spans()
    rates = None if settings.rate is None else Rates(settings.rate, settings.rate_store)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        # Retries are for those who wait for a server to start; callers here are better told soon.
        client = AsyncClient(
            settings.url,
            model=settings.model,
            timeout_s=settings.timeout_s,
            retries=2,
            batch_size=PART_TEXTS,
        )
        async with client:
            asking = app.state.asking = Asking(
                client,
                settings.entries,
                settings.most_texts,
                settings.most_characters,
                spans=spans,
                asked=metrics.asked,
            )
            metrics.watch(asking)
            watching = asyncio.create_task(asking.watch())
            yield
            watching.cancel()
            await asyncio.to_thread(spans.flush)  # uvicorn ends by a signal: no exit runs after it
            EVENTS.info("stopped")

    def answer(path: str, error: ArrowheadError, param: str | None = None) -> Response:
        reason = failures.reason(error)
        metrics.refused.labels(reason).inc()
        if (call := CALL.get()) is not None:
            call.reason = reason
        if path.startswith("/v1/"):
            failure = failures.openai(error, param)
        elif path.startswith("/v2/"):
            failure = failures.triton(error)
        else:
            failure = failures.tei(error)
        response = json(failure.body, failure.status)
        response.headers.update(failure.headers)
        return response

    app = FastAPI(
        title="Arrowhead",
        version=version("arrowhead"),
        description="Text embeddings from NVIDIA Triton.",
        lifespan=lifespan,
        # FastAPI's own begins behind the gate, and knows nothing of what is asked as one.
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    app.state.draining = False
    # For the pages only: the gate has looked at keys before.
    asked: Sequence[Any] = [Depends(HTTPBearer(auto_error=False))] if access.wanted else []
    app.include_router(tei.router, dependencies=asked)
    app.include_router(openai.router, dependencies=asked)
    app.include_router(triton.router, dependencies=asked)
    app.include_router(page.router)
    _probe(app, metrics)
    if settings.tokens is not None:

        @app.get(METADATA)
        async def protected_resource(request: Request) -> dict[str, Any]:
            """Where tokens for this gateway come from (RFC 9728)."""
            return access.resource(request.scope)

    _answer_errors(app, answer)
    app.add_middleware(
        Gate,
        access=access,
        rates=rates,
        bodies=Bodies(
            int(settings.most_body_mb * MB), int(settings.most_memory_mb * MB), metrics.memory
        ),
        most=settings.in_flight,
        metrics=metrics,
        answer=answer,
        spans=spans,
    )
    if settings.cors_origins:  # outermost: a preflight brings no key, and refusals are read too
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type", "X-Request-Id", "traceparent"],
            expose_headers=_SHOWN,
        )
    return app


def _probe(app: FastAPI, metrics: Metrics) -> None:
    """The routes by which machines look after the gateway."""

    async def lives() -> bool:
        try:
            client = app.state.asking.client
            with unseen():
                await client.embed(f"health {next(_PROBES)} {time.time_ns()}", progress=False)
        except ServerError as error:
            _LOG.warning("not healthy: %s", error)  # strangers are not told where Triton is
            return False
        return True

    is_healthy = Shared(lives)
    is_ready = Shared(lambda: app.state.asking.ready())

    @app.get("/health", response_class=Response, responses={503: {"model": failures.TritonFailure}})
    async def health() -> Response:
        """200 if a text that nobody asked before is embedded now, else 503. Tried once a second."""
        if await is_healthy():
            return Response(status_code=200)
        return json({"error": "the model does not answer; the gateway's log says why"}, 503)

    @app.get("/ready", response_class=Response, responses={503: {"description": "Not ready"}})
    async def ready() -> Response:
        """200 if Triton says that the model is ready, else 503. Asked once a second.

        503 as well until the gateway has the model's tokenizer, and from the moment that it is
        asked to stop (`--drain`).
        """
        if app.state.draining:
            return json({"error": "the gateway was asked to stop and answers on for a moment"}, 503)
        return Response(status_code=200 if await is_ready() else 503)

    @app.get("/metrics", include_in_schema=False)
    async def shown() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)


class Shared(Generic[T]):
    """A call whose result all share who ask within a second: strangers cannot make it work more."""

    def __init__(self, call: Callable[[], Awaitable[T]]) -> None:
        self._call = call
        self._task: asyncio.Future[T] | None = None
        self._began = 0.0

    async def __call__(self) -> T:
        """The result, of now or of less than a second ago."""
        now = time.monotonic()
        if self._task is None or (self._task.done() and now - self._began >= _PROBED_S):
            self._task, self._began = asyncio.ensure_future(self._call()), now
        return await asyncio.shield(self._task)


def _answer_errors(app: FastAPI, answer: Callable[..., Response]) -> None:
    """Each error in the dialect of its path."""

    async def failed(request: Request, error: Exception) -> Response:
        assert isinstance(error, ArrowheadError)  # noqa: S101 (tells the type checker)
        return answer(request.url.path, error)

    async def not_understood(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)  # noqa: S101 (tells the type checker)
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"][1:]) or "body"
        return answer(request.url.path, InvalidInput(f"{place}: {first['msg']}"), place)

    async def no_route(request: Request, error: Exception) -> Response:
        """Of paths and methods that there are not, and of bodies that FastAPI could not parse."""
        assert isinstance(error, HTTPException)  # noqa: S101 (tells the type checker)
        if error.status_code == 400:
            return answer(request.url.path, InvalidInput("body: no JSON"))
        response = answer(request.url.path, InvalidInput(f"{request.url.path}: {error.detail}"))
        response.status_code = error.status_code
        response.headers.update(error.headers or {})  # of 405: which methods there are
        return response

    app.add_exception_handler(ArrowheadError, failed)
    app.add_exception_handler(RequestValidationError, not_understood)
    app.add_exception_handler(HTTPException, no_route)
