# SPDX-License-Identifier: Apache-2.0
"""The gateway's spans, where there are any.

    caller's span ─▶ POST /embed ─▶ tokenize
                        │       └─▶ wait       from the queue to the request to Triton; links to:
                        └─▶ ask ─▶ embeddings minilm (the client's) ─▶ Triton's own

Of several requests that are asked for as one, the first that is sampled is the parent of `ask`, and
the others are linked from it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

from starlette.types import Scope

from arrowhead_client._tracing import Tracing, endpoint, tracing
from arrowhead_server.gateway.call import Call

if TYPE_CHECKING:
    from opentelemetry.context import Context

_PROPAGATED = (b"traceparent", b"tracestate")  # not baggage: a stranger's is none of ours


class Spans:
    """Makes them, or does nothing where traces are not wanted."""

    def __init__(self) -> None:
        self._tracing: Tracing | None = tracing() if endpoint() else None

    def flush(self) -> None:
        """Sends what is not sent yet."""
        if self._tracing is not None:
            self._tracing.flush()

    def request(self, scope: Scope, call: Call) -> AbstractContextManager[object]:
        """The span of a request, in the trace of its caller; ends with what came of it."""
        return nullcontext() if self._tracing is None else _request(self._tracing, scope, call)

    def tokenizing(self, texts: int) -> AbstractContextManager[object]:
        """The span of a request's new texts, until they are ids."""
        if self._tracing is None:
            return nullcontext()
        return self._tracing.span("tokenize", attributes={"arrowhead.texts": texts})

    def asking(
        self, calls: Sequence[tuple[Call, int]], texts: int
    ) -> AbstractContextManager[object]:
        """The span of one request to Triton.

        Args:
            calls: for whom, and since when they wait, in nanoseconds.
            texts: how many it has.
        """
        waiting = [(call.context, since) for call, since in calls if call.context is not None]
        if self._tracing is None or not waiting:
            return nullcontext()
        return _asking(self._tracing, waiting, texts)


@contextmanager
def _request(tracing: Tracing, scope: Scope, call: Call) -> Iterator[None]:
    from opentelemetry import context, propagate, trace

    carrier = {
        name.decode(): value.decode("latin-1")
        for name, value in scope["headers"]
        if name in _PROPAGATED
    }
    method = scope["method"]
    with tracing.span(
        method, trace.SpanKind.SERVER, context=propagate.extract(carrier, context.Context())
    ) as span:
        call.context = context.get_current()
        try:
            yield
        finally:
            route = getattr(scope.get("route"), "path", "other")
            span.update_name(f"{method} {route}")
            span.set_attributes(
                {
                    "http.request.method": method,
                    "http.route": route,
                    "http.response.status_code": call.status,
                    "arrowhead.request_id": call.request_id,
                    "arrowhead.texts": call.texts,
                    "arrowhead.tokens": call.tokens,
                }
            )
            if call.status >= 500:
                span.set_status(trace.StatusCode.ERROR)


@contextmanager
def _asking(tracing: Tracing, waiting: Sequence[tuple[Context, int]], texts: int) -> Iterator[None]:
    from opentelemetry import trace

    spans = [trace.get_current_span(context).get_span_context() for context, _ in waiting]
    first = next((place for place, one in enumerate(spans) if one.trace_flags.sampled), 0)
    links = [trace.Link(one) for place, one in enumerate(spans) if place != first]
    with tracing.span(
        "ask", context=waiting[first][0], links=links, attributes={"arrowhead.texts": texts}
    ) as span:
        link = trace.Link(span.get_span_context())
        for context, since in waiting:
            tracing.past("wait", context, since, time.time_ns(), link)
        yield
