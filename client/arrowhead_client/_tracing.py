# SPDX-License-Identifier: Apache-2.0
"""Spans of OpenTelemetry's, for programs that have it, and for our commands if they are told to.

A program that makes spans of its own has imported OpenTelemetry and says in code or by variables
where they go, and ours go there too. Our commands call `start`, which imports it where
OTEL_EXPORTER_OTLP_ENDPOINT (or the same of traces alone) is set and the packages of
`arrowhead[otel]` are there. Nothing else imports it. No span holds a text.
"""

from __future__ import annotations

import atexit
import logging
import math
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from contextvars import ContextVar
from functools import cache, partial
from typing import TYPE_CHECKING

from arrowhead_client._errors import InvalidInput

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.trace import Link, Span, SpanKind

ENDPOINT, TRACES_ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"
_FLUSH_S = 2.0
_UNSEEN: ContextVar[bool] = ContextVar("unseen", default=False)
_LOG = logging.getLogger(__name__)


def endpoint() -> str | None:
    """Where spans go, by OTLP over HTTP; None: nowhere."""
    if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    if os.environ.get("OTEL_TRACES_EXPORTER", "otlp") != "otlp":
        return None
    if own := os.environ.get(TRACES_ENDPOINT):
        return own
    base = os.environ.get(ENDPOINT)
    return f"{base.rstrip('/')}/v1/traces" if base else None


def start(service: str) -> Callable[[], None]:
    """Sends this process's spans where the variables say, sampled as they say.

    Args:
        service: its name, unless OTEL_SERVICE_NAME has another.

    Returns:
        what to call at the end: sends what is not sent yet, within two seconds.

    Raises:
        InvalidInput: OTEL_TRACES_SAMPLER_ARG is not what its sampler wants.
    """
    if endpoint() is None:
        return _nothing
    ratio()
    try:
        from opentelemetry import trace
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        _LOG.warning("no traces, though %s is set: pip install 'arrowhead[otel]'", ENDPOINT)
        return _nothing
    named = {} if os.environ.get("OTEL_SERVICE_NAME") else {SERVICE_NAME: service}
    # Its own end would wait for a collector that is away, for seconds a span.
    provider = TracerProvider(resource=Resource.create(named), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
    flush = partial(_flush, provider)
    atexit.register(flush)
    return flush


def ratio() -> float | None:
    """The part of traces to keep, where OTEL_TRACES_SAMPLER asks for one.

    Raises:
        InvalidInput: OTEL_TRACES_SAMPLER_ARG is not 0 to 1.
    """
    if not os.environ.get("OTEL_TRACES_SAMPLER", "").endswith("traceidratio"):
        return None
    told = os.environ.get("OTEL_TRACES_SAMPLER_ARG") or "1"
    try:
        found = float(told)
    except ValueError:
        found = math.nan
    if not 0 <= found <= 1:
        raise InvalidInput(f"OTEL_TRACES_SAMPLER_ARG={told!r}: wanted a number from 0 to 1")
    return found


def _nothing() -> None:
    pass


def _flush(provider: object) -> None:
    """Bounded by a thread: the SDK's `force_flush` ignores its timeout."""
    if hasattr(provider, "force_flush"):  # the SDK's
        thread = threading.Thread(target=provider.force_flush, daemon=True)
        with suppress(RuntimeError):  # from Python 3.12 on, none begins once the program has ended
            thread.start()
            thread.join(_FLUSH_S)


def tracing() -> Tracing | None:
    """What makes spans, if this program has imported OpenTelemetry.

    Asked for each call: a program may say where they go at any time.
    """
    return _made() if "opentelemetry.trace" in sys.modules else None


@cache
def _made() -> Tracing:
    return Tracing()


class Tracing:
    """Makes spans, by the provider that the program has set up."""

    def __init__(self) -> None:
        from importlib.metadata import version

        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        # Not the program's own ones: its baggage is none of a server's business, and names that
        # gRPC refuses (X-Amzn-Trace-Id) would cost the call.
        self._trace, self._propagator = trace, TraceContextTextMapPropagator()
        self._tracer = trace.get_tracer("arrowhead", version("arrowhead"))

    @contextmanager
    def span(
        self,
        name: str,
        kind: SpanKind | None = None,
        *,
        context: Context | None = None,
        links: Sequence[Link] = (),
        attributes: Mapping[str, str | int] | None = None,
    ) -> Iterator[Span]:
        """A span that is the current one meanwhile. Of an error it tells the class alone.

        Args:
            name: of few.
            kind: internal unless told otherwise.
            context: its parent's; the current one by default.
            links: to spans of other traces.
            attributes: what it tells.
        """
        trace = self._trace
        with self._tracer.start_as_current_span(
            name,
            context,
            kind or trace.SpanKind.INTERNAL,
            attributes,
            links,
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            try:
                yield span
            except BaseException as error:
                span.set_attribute("error.type", type(error).__name__)
                span.set_status(trace.StatusCode.ERROR)
                raise

    def past(self, name: str, context: Context, began: int, ended: int, link: Link) -> None:
        """A span that is over, from and to a time in nanoseconds."""
        self._tracer.start_span(name, context, links=[link], start_time=began).end(ended)

    def flush(self) -> None:
        """Sends what is not sent yet, if that takes no longer than two seconds."""
        _flush(self._trace.get_tracer_provider())

    @property
    def arrives(self) -> bool:
        """Whether the program has said where spans go."""
        return not isinstance(self._trace.get_tracer_provider(), self._trace.ProxyTracerProvider)

    def headers(self) -> tuple[tuple[str, str], ...]:
        """What tells a server of the current span (W3C traceparent), if it is sampled.

        Of others nothing is told: Triton traces whatever it is told of.
        """
        if not self._trace.get_current_span().get_span_context().trace_flags.sampled:
            return ()
        carrier: dict[str, str] = {}
        self._propagator.inject(carrier)
        return tuple(carrier.items())

    def embedding(self, model: str, request_id: str | None) -> AbstractContextManager[Span]:
        """The span of a call for vectors, named as OpenTelemetry's conventions have it."""
        attributes = {"gen_ai.operation.name": "embeddings", "gen_ai.request.model": model}
        if request_id:
            attributes["arrowhead.request_id"] = request_id
        return self.span(f"embeddings {model}", self._trace.SpanKind.CLIENT, attributes=attributes)


@contextmanager
def unseen() -> Iterator[None]:
    """Calls for vectors have no span meanwhile: a probe's would be a trace of its own each time."""
    before = _UNSEEN.set(True)
    try:
        yield
    finally:
        _UNSEEN.reset(before)


def span_headers() -> tuple[tuple[str, str], ...]:
    """`Tracing.headers`, or none."""
    made = tracing()
    return () if made is None else made.headers()


def embedding(model: str, request_id: str | None) -> AbstractContextManager[Span | None]:
    """`Tracing.embedding`, or nothing."""
    made = tracing()
    if made is None or not made.arrives or _UNSEEN.get():
        return nullcontext()
    return made.embedding(model, request_id)
