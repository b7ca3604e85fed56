# SPDX-License-Identifier: Apache-2.0
"""`Gate`: what each request passes before a route sees it. ASGI middleware.

    who asks ─▶ how often ─▶ how many at once ─▶ how large ─▶ the application

In the order of what they cost: a stranger's body is not read.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import AsyncExitStack

from fastapi import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from arrowhead_client import ArrowheadError
from arrowhead_server.gateway.access import OPEN, Access, address
from arrowhead_server.gateway.bodies import TOKENIZED, Bodies
from arrowhead_server.gateway.call import CALL, EVENTS, HEADER, Call, request_id
from arrowhead_server.gateway.failures import Busy
from arrowhead_server.gateway.metrics import Metrics
from arrowhead_server.gateway.rates import Rates
from arrowhead_server.gateway.spans import Spans

PIECE = 65_536  # bytes of an answer that are sent at once


class Gate:
    """Lets requests in, or answers in the caller's dialect why not; counts and times all.

    Args:
        app: what is behind it.
        access: knows callers.
        rates: counts their requests; None: they may ask as often as they like.
        bodies: reads what they send.
        most: requests that may be under way at once.
        metrics: told of each request.
        answer: makes a response of an error.
        spans: makes them of requests.
    """

    def __init__(
        self,
        app: ASGIApp,
        access: Access,
        rates: Rates | None,
        bodies: Bodies,
        most: int,
        metrics: Metrics,
        answer: Callable[[str, ArrowheadError], Response],
        spans: Spans,
    ) -> None:
        self._app, self._access, self._rates, self._bodies = app, access, rates, bodies
        self._most, self._metrics, self._answer = most, metrics, answer
        self._spans = spans
        self._under_way = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, or answers why not."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        call = Call(request_id(scope))
        CALL.set(call)

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                call.status = message["status"]
                headers = [*message["headers"], (HEADER, call.request_id.encode())]
                message = {**message, "headers": headers}
            await _send(message, send)

        is_probe = scope["path"] in OPEN and scope["method"] in ("GET", "HEAD")
        try:
            if is_probe:
                await self._app(scope, receive, watched)
            else:
                with self._spans.request(scope, call):
                    await self._let_in(scope, receive, watched, call)
        finally:
            # As they are written in routes: what callers put into a path is their own choice.
            route = getattr(scope.get("route"), "path", "other")
            seconds = time.perf_counter() - began
            self._metrics.seconds.labels(route, call.status).observe(seconds)
            if not is_probe or call.status >= 400:
                _tell(call, scope["method"], route, seconds)

    async def _let_in(self, scope: Scope, receive: Receive, send: Send, call: Call) -> None:
        told: dict[str, str] = {}

        async def telling(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [(name.lower().encode(), told[name].encode()) for name in told]
                message = {**message, "headers": [*message["headers"], *headers]}
            await send(message)

        async with AsyncExitStack() as stack:
            try:
                told = await self._counted(scope, call)
                self._check_room()
                weight = TOKENIZED if scope["path"] == "/tokenize" else 1
                receive = await stack.enter_async_context(self._bodies.read(receive, weight))
                self._check_room()
            except ArrowheadError as error:
                await self._answer(scope["path"], error)(scope, receive, telling)
                return
            self._set(self._under_way + 1)
            try:
                await self._app(scope, receive, telling)
            finally:
                self._set(self._under_way - 1)

    async def _counted(self, scope: Scope, call: Call) -> dict[str, str]:
        """Who asks, counted; what there is to tell them."""
        try:
            caller = await self._access.caller(scope)
        except ArrowheadError:
            if self._rates is not None:  # those who are not let in are counted where they are
                await self._rates.count(address(scope))
            raise
        if self._access.wanted:
            call.caller = caller
        return {} if self._rates is None else await self._rates.count(caller)

    def _check_room(self) -> None:
        if self._under_way >= self._most:
            raise Busy(f"{self._most} requests are under way already; try again")

    def _set(self, under_way: int) -> None:
        self._under_way = under_way
        self._metrics.in_flight.set(under_way)


def _tell(call: Call, method: str, route: str, seconds: float) -> None:
    """A line of the log, of machines alone: they want each request, people what goes wrong."""
    if not EVENTS.isEnabledFor(logging.INFO):
        return
    line = {
        "method": method,
        "path": route,
        "status": call.status,
        "ms": round(seconds * 1000, 3),
        "texts": call.texts,
        "tokens": call.tokens,
        "request_id": call.request_id,
    }
    if call.caller:
        line["caller"] = call.caller
    if call.reason:
        line["reason"] = call.reason
    EVENTS.info("request", extra=line)


async def _send(message: Message, send: Send) -> None:
    """Sends an answer piece by piece, each when most of the one before it was taken.

    So who does not take it stays under way, and the connection, which waits for no more than a
    piece, tells them from those who are slow.
    """
    body = message.get("body", b"")
    if len(body) <= PIECE:
        await send(message)
        return
    for place in range(0, len(body), PIECE):
        await send({**message, "body": body[place : place + PIECE], "more_body": True})
    if not message.get("more_body"):
        await send({**message, "body": b""})
