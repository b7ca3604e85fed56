# SPDX-License-Identifier: Apache-2.0
"""The FastAPI application: both dialects, health, metrics, and a limit on what is in flight."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.metadata import version

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Gauge,
    Histogram,
    Metric,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from arrowhead_client import ArrowheadError, AsyncClient, InvalidInput, ServerError
from arrowhead_server.gateway import failures, openai, page, tei, triton
from arrowhead_server.gateway.asking import MOST_TEXTS, Asking
from arrowhead_server.gateway.embedder import ENTRIES
from arrowhead_server.gateway.web import Model, json

MOST_BODY_MB = 16  # 2,048 texts of the longest that a model of 512 tokens reads take about 6
_MB = 10**6
UNLIMITED = ("/health", "/ready", "/metrics", "/docs", "/openapi.json")
_PROBES = itertools.count()
_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)


@dataclass(frozen=True)
class Settings:
    """What a gateway is told.

    Attributes:
        url, model: of Triton, as `AsyncClient` takes them.
        entries: texts remembered.
        in_flight: requests that may be under way at once; more are answered with 429.
        most_texts: in a request.
        most_body_mb: of a request's body, in 10^6 bytes; more is answered with 413.
        timeout_s: for Triton's part of a request.
    """

    url: str
    model: str
    entries: int = ENTRIES
    in_flight: int = 256
    most_texts: int = MOST_TEXTS
    most_body_mb: float = MOST_BODY_MB
    timeout_s: float = 30.0


def create_app(settings: Settings) -> FastAPI:
    """The application; it connects when it is started."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        # Retries are for those who wait for a server to start; callers here are better told soon.
        client = AsyncClient(
            settings.url,
            model=settings.model,
            timeout_s=settings.timeout_s,
            retries=2,
            batch_size=100,
        )
        async with client:
            asking = app.state.asking = Asking(client, settings.entries, settings.most_texts)
            metrics.watch(asking)
            watching = asyncio.create_task(asking.watch())
            yield
            watching.cancel()

    app = FastAPI(
        title="Arrowhead",
        version=version("arrowhead"),
        description="Text embeddings from NVIDIA Triton.",
        lifespan=lifespan,
    )
    metrics = Metrics()
    app.include_router(tei.router)
    app.include_router(openai.router)
    app.include_router(triton.router)
    app.include_router(page.router)
    app.add_exception_handler(ArrowheadError, _failed)
    app.add_exception_handler(RequestValidationError, _not_understood)

    @app.get("/health", response_class=Response, responses={503: {"model": failures.TritonFailure}})
    async def health(model: Model) -> Response:
        """200 if a text that nobody asked before is embedded now, else 503."""
        try:
            await model.client.embed(f"health {next(_PROBES)} {time.time_ns()}", progress=False)
        except ServerError as error:
            return json({"error": str(error)}, 503)
        return Response(status_code=200)

    @app.get("/ready", response_class=Response, responses={503: {"description": "Not ready"}})
    async def ready(model: Model) -> Response:
        """200 if Triton says that the model is ready, else 503."""
        return Response(status_code=200 if await model.client.ready() else 503)

    @app.get("/metrics", include_in_schema=False)
    async def shown() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    app.add_exception_handler(HTTPException, _no_route)
    app.add_middleware(
        Gate,
        metrics=metrics,
        most=settings.in_flight,
        most_body=int(settings.most_body_mb * _MB),
    )
    return app


class Metrics:
    """What Prometheus reads."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.seconds = Histogram(
            "arrowhead_gateway_request_seconds",
            "From a request's first byte to its answer's last",
            ["path", "status"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.in_flight = Gauge(
            "arrowhead_gateway_in_flight", "Requests under way", registry=self.registry
        )

    def watch(self, asking: Asking) -> None:
        """Tells the counts of its texts."""
        self.registry.register(_Texts(asking))


class _Texts(Collector):
    """Counts, read when Prometheus asks."""

    def __init__(self, asking: Asking) -> None:
        self._asking = asking

    def collect(self) -> Iterator[Metric]:
        counts = self._asking.counts
        texts = CounterMetricFamily(
            "arrowhead_gateway_texts",
            "Texts: remembered (hit), asked for by another request already (merged), or new (miss)",
            labels=["how"],
        )
        texts.add_metric(["hit"], counts.hits)
        texts.add_metric(["merged"], counts.merged)
        texts.add_metric(["miss"], counts.misses)
        yield texts
        entries = "Texts remembered"
        yield GaugeMetricFamily("arrowhead_gateway_entries", entries, self._asking.remembered)


class Gate:
    """Counts and times requests, turns away too many and too large ones. ASGI middleware."""

    def __init__(self, app: ASGIApp, metrics: Metrics, most: int, most_body: int) -> None:
        self._app, self._metrics, self._most, self._most_body = app, metrics, most, most_body
        self._under_way = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, or answers 429 or 413."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path, status, began = scope["path"], 500, time.perf_counter()

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self._under_way += 1
        self._metrics.in_flight.set(self._under_way)
        try:
            if self._under_way > self._most and path not in UNLIMITED:
                busy = failures.Busy(f"{self._most} requests are under way already; try again")
                await _answer(path, busy)(scope, receive, watched)
            elif (body := await self._body(receive)) is None:
                large = failures.TooLarge(
                    f"a body of more than {self._most_body / _MB:g} MB: send fewer texts a request"
                )
                await _answer(path, large)(scope, receive, watched)
            else:
                await self._app(scope, body, watched)
        finally:
            self._under_way -= 1
            self._metrics.in_flight.set(self._under_way)
            # As they are written here: what callers put into a path is their own choice.
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.seconds.labels(route, status).observe(time.perf_counter() - began)

    async def _body(self, receive: Receive) -> Receive | None:
        """The whole body, to be received again; None, and the rest unread, if it is too large."""
        parts: list[bytes] = []
        left = self._most_body
        while True:
            message = await receive()
            if message["type"] != "http.request":  # the caller went away
                break
            parts.append(message.get("body", b""))
            left -= len(parts[-1])
            if left < 0:
                return None
            if not message.get("more_body"):
                message = {**message, "body": b"".join(parts)}
                break
        whole = [message]

        async def again() -> Message:
            return whole.pop() if whole else await receive()

        return again


async def _failed(request: Request, error: Exception) -> Response:
    assert isinstance(error, ArrowheadError)  # noqa: S101 (tells the type checker)
    return _answer(request.url.path, error)


async def _not_understood(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)  # noqa: S101 (tells the type checker)
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"][1:]) or "body"
    return _answer(request.url.path, InvalidInput(f"{place}: {first['msg']}"), place)


async def _no_route(request: Request, error: Exception) -> Response:
    """Of paths and methods that there are not, and of bodies that FastAPI could not even parse."""
    assert isinstance(error, HTTPException)  # noqa: S101 (tells the type checker)
    if error.status_code == 400:
        return _answer(request.url.path, InvalidInput("body: no JSON, or nested too deep"))
    response = _answer(request.url.path, InvalidInput(f"{request.url.path}: {error.detail}"))
    response.status_code = error.status_code
    response.headers.update(error.headers or {})  # of 405: which methods there are
    return response


def _answer(path: str, error: ArrowheadError, param: str | None = None) -> Response:
    if path.startswith("/v1/"):
        failure = failures.openai(error, param)
    elif path.startswith("/v2/"):
        failure = failures.triton(error)
    else:
        failure = failures.tei(error)
    response = json(failure.body, failure.status)
    response.headers.update(failure.headers)
    return response
