# SPDX-License-Identifier: Apache-2.0
"""What went wrong, as the dialect of the caller says it: a status, a body and headers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from arrowhead_server.gateway.asking import TextTooLarge, TooManyTexts, UnknownModel

RETRY_AFTER_S = 1


class Refused(ArrowheadError):
    """A request that the gateway does not let through.

    Attributes:
        headers: what to tell beside it.
    """

    def __init__(self, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.headers = dict(headers or {})


class Unauthorized(Refused):
    """The caller brought nothing that lets them in; `code` is RFC 6750's word for it."""

    def __init__(self, message: str, code: str = "invalid_token") -> None:
        super().__init__(message)
        self.code = code


class Forbidden(Refused):
    """The caller's token is right, but not for this; `scopes` are those that are wanted."""

    code = "insufficient_scope"

    def __init__(self, message: str, scopes: Sequence[str]) -> None:
        super().__init__(message)
        self.scopes = scopes


class TooFast(Refused):
    """More requests of one caller than the rate that each may have."""


class Busy(Refused):
    """More requests in flight than the gateway lets through to Triton."""


class OutOfMemory(Refused):
    """What is under way leaves no memory for this request."""


class TooLarge(Refused):
    """A request whose body is larger than the gateway reads."""


class TooSlow(Refused):
    """A request whose body does not come."""


class TooDeep(Refused):
    """JSON that is nested deeper than any request is."""


class _Kind(NamedTuple):
    """How each dialect names an error, and how metrics do."""

    error: type[Exception]
    tei_status: int
    tei_type: str
    openai_status: int
    openai_type: str
    reason: str
    openai_code: str | None = None


_BAD, _MANY = "invalid_request_error", "rate_limit_error"
# The first that fits counts. TEI's types are those of its router's `ErrorType`, which has none for
# callers that may not ask.
_KINDS = (
    _Kind(Unauthorized, 401, "Validation", 401, _BAD, "key", "invalid_api_key"),
    _Kind(Forbidden, 403, "Validation", 403, _BAD, "scope", "insufficient_permissions"),
    _Kind(TooFast, 429, "Overloaded", 429, _MANY, "rate", "rate_limit_exceeded"),
    _Kind(Busy, 429, "Overloaded", 429, _MANY, "busy"),
    _Kind(OutOfMemory, 429, "Overloaded", 429, _MANY, "memory"),
    _Kind(TooSlow, 408, "Validation", 408, _BAD, "slow"),
    _Kind(TooLarge, 413, "Validation", 413, _BAD, "body"),
    _Kind(TooDeep, 422, "Validation", 400, _BAD, "depth"),
    _Kind(UnknownModel, 404, "Validation", 404, _BAD, "model", "model_not_found"),
    _Kind(TextTooLong, 413, "Validation", 400, _BAD, "length"),
    _Kind(TextTooLarge, 413, "Validation", 400, _BAD, "text"),
    _Kind(TooManyTexts, 413, "Validation", 400, _BAD, "texts"),
    _Kind(InvalidInput, 422, "Validation", 400, _BAD, "invalid"),
    _Kind(InvalidRequest, 422, "Validation", 400, _BAD, "invalid"),
    _Kind(ModelNotFound, 503, "Unhealthy", 503, "server_error", "triton"),
    _Kind(Unavailable, 503, "Unhealthy", 503, "server_error", "triton"),
    _Kind(TimedOut, 503, "Unhealthy", 503, "server_error", "triton"),
    _Kind(ArrowheadError, 424, "Backend", 500, "server_error", "triton"),
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
    return Failure(kind.tei_status, body, _headers(kind.tei_status, error))


def openai(error: ArrowheadError, param: str | None = None) -> Failure:
    """As OpenAI would answer; `param` is the field at fault, if one is."""
    kind = _kind(error)
    told = {
        "message": str(error),
        "type": kind.openai_type,
        "param": param,
        "code": kind.openai_code,
    }
    return Failure(kind.openai_status, {"error": told}, _headers(kind.openai_status, error))


def reason(error: ArrowheadError) -> str:
    """A word for metrics, one of a few."""
    return _kind(error).reason


def triton(error: ArrowheadError) -> Failure:
    """As Triton would answer over HTTP; its statuses are OpenAI's."""
    status = _kind(error).openai_status
    return Failure(status, {"error": str(error)}, _headers(status, error))


def _kind(error: Exception) -> _Kind:
    return next(kind for kind in _KINDS if isinstance(error, kind.error))


def _headers(status: int, error: ArrowheadError) -> dict[str, str]:
    told = {"Retry-After": str(RETRY_AFTER_S)} if status in (429, 503) else {}
    return {**told, **(error.headers if isinstance(error, Refused) else {})}
