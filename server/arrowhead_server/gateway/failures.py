# SPDX-License-Identifier: Apache-2.0
"""What went wrong, as the dialect of the caller says it: a status and a body."""

from __future__ import annotations

from typing import Any, NamedTuple

from pydantic import BaseModel

from arrowhead_client import (
    ArrowheadError,
    InvalidInput,
    InvalidRequest,
    ModelNotFound,
    TextTooLong,
    TimedOut,
    Unavailable,
)
from arrowhead_server.gateway.asking import TooManyTexts, UnknownModel

RETRY_AFTER_S = 1


class Busy(ArrowheadError):
    """More requests in flight than the gateway lets through to Triton."""


class TooLarge(ArrowheadError):
    """A request whose body is larger than the gateway reads."""


class _Kind(NamedTuple):
    """How each dialect names an error."""

    error: type[Exception]
    tei_status: int
    tei_type: str
    openai_status: int
    openai_type: str


# The first that fits counts. TEI's statuses and types are those of its router's `ErrorType`.
_KINDS = (
    _Kind(Busy, 429, "Overloaded", 429, "rate_limit_error"),
    _Kind(UnknownModel, 404, "Validation", 404, "invalid_request_error"),
    _Kind(TooLarge, 413, "Validation", 413, "invalid_request_error"),
    _Kind(TextTooLong, 413, "Validation", 400, "invalid_request_error"),
    _Kind(TooManyTexts, 413, "Validation", 400, "invalid_request_error"),
    _Kind(InvalidInput, 422, "Validation", 400, "invalid_request_error"),
    _Kind(InvalidRequest, 422, "Validation", 400, "invalid_request_error"),
    _Kind(ModelNotFound, 503, "Unhealthy", 503, "server_error"),
    _Kind(Unavailable, 503, "Unhealthy", 503, "server_error"),
    _Kind(TimedOut, 503, "Unhealthy", 503, "server_error"),
    _Kind(ArrowheadError, 424, "Backend", 500, "server_error"),
)


class Failure(NamedTuple):
    """A response."""

    status: int
    body: dict[str, Any]
    headers: dict[str, str]


class TeiFailure(BaseModel):
    """Why TEI's routes do not answer."""

    error: str
    error_type: str


class OpenaiFault(BaseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class OpenaiFailure(BaseModel):
    """Why OpenAI's routes do not answer."""

    error: OpenaiFault


class TritonFailure(BaseModel):
    """Why Triton's routes do not answer."""

    error: str


def declared(body: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """A route's failures, for the OpenAPI page."""
    return {"4XX": {"model": body}, "5XX": {"model": body}}


def tei(error: ArrowheadError) -> Failure:
    """As text-embeddings-inference would answer."""
    kind = _kind(error)
    body = {"error": str(error), "error_type": kind.tei_type}
    return Failure(kind.tei_status, body, _headers(kind.tei_status))


def openai(error: ArrowheadError, param: str | None = None) -> Failure:
    """As OpenAI would answer; `param` is the field at fault, if one is."""
    kind = _kind(error)
    code = "model_not_found" if isinstance(error, UnknownModel) else None
    told = {"message": str(error), "type": kind.openai_type, "param": param, "code": code}
    return Failure(kind.openai_status, {"error": told}, _headers(kind.openai_status))


def triton(error: ArrowheadError) -> Failure:
    """As Triton would answer over HTTP; its statuses are OpenAI's."""
    status = _kind(error).openai_status
    return Failure(status, {"error": str(error)}, _headers(status))


def _kind(error: Exception) -> _Kind:
    return next(kind for kind in _KINDS if isinstance(error, kind.error))


def _headers(status: int) -> dict[str, str]:
    return {"Retry-After": str(RETRY_AFTER_S)} if status in (429, 503) else {}
