# SPDX-License-Identifier: Apache-2.0
"""`Call`: what is known of a request while it is under way, wherever in the gateway it is."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterable
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from starlette.types import Scope

from arrowhead_client._plan import is_request_id

if TYPE_CHECKING:
    from opentelemetry.context import Context

# What happens, for machines; people are told what goes wrong, by the modules' own loggers.
EVENTS = logging.getLogger("arrowhead_gateway")
HEADER = b"x-request-id"
# In one. A request to Triton has at most 100 texts, and may have more callers; over HTTP, HAProxy
# lets JSON of 16 KiB through.
_MOST_IDS, _MOST_CHARACTERS = 200, 8000
CALL: ContextVar[Call | None] = ContextVar("call", default=None)


@dataclass
class Call:
    """A request.

    Attributes:
        request_id: the caller's, or one of ours.
        caller: a key's name or a token's subject; empty where nobody is asked for either.
        texts, tokens: that were answered.
        status: of the answer.
        reason: why it was refused, in a word; empty if it was not.
        context: with the span that it is in OpenTelemetry; None without.
    """

    request_id: str
    caller: str = ""
    texts: int = 0
    tokens: int = 0
    status: int = 500
    reason: str = ""
    context: Context | None = None


def request_id(scope: Scope) -> str:
    """The caller's own, if it may stand in logs; else a new one."""
    met = [value for name, value in scope["headers"] if name == HEADER]
    told = met[0].decode("latin-1") if len(met) == 1 else ""
    return told if is_request_id(told) else secrets.token_hex(16)


def joined(calls: Iterable[Call]) -> str | None:
    """One id for several requests that are asked for as one: theirs, as far as there is room."""
    ids: list[str] = []
    room = _MOST_CHARACTERS
    for call in islice(calls, _MOST_IDS):
        room -= len(call.request_id) + 1
        if room < 0:
            break
        ids.append(call.request_id)
    return ",".join(ids) or None


def with_request_id(record: logging.LogRecord) -> bool:
    """A filter of logs that drops nothing: lines say which request they are of."""
    call = CALL.get()
    if call is not None and not hasattr(record, "request_id"):
        record.request_id = call.request_id
    return True
