# SPDX-License-Identifier: Apache-2.0
"""Requests' bodies: read whole before anything is made of them, and weighed.

JSON takes many times its size in memory once it is read: `[],` is three bytes, its list 64. So what
a request will need is told from its bytes, and requests that together need more than there is to
spend are turned away before they are parsed.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from json import detect_encoding

import anyio
from prometheus_client import Gauge
from starlette.types import Message, Receive

from arrowhead_client import InvalidInput
from arrowhead_server.gateway.failures import OutOfMemory, TooDeep, TooLarge, TooSlow

MB = 10**6
MOST_DEPTH = 16  # of JSON; the requests that there are have 3 at most
READ_S = 30.0
# What a request is taken to need. Of a text, or a list of ids: its vector of some hundred to a
# thousand components, as numbers and as JSON. Of a byte: itself, and as a character of the decoded
# body, of its text, and of its text with a prompt in front.
PER_TEXT, _PER_VALUE, _COPIES = 32_768, 64, 3
TOKENIZED = 4  # times as much of a text whose some hundred tokens are told, each by itself

_STRING = re.compile(rb'"[^"]*"?')
_BRACKETS = bytes.maketrans(b"{}", b"[]")
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
# UTF-8's first bytes of characters that Python keeps in four bytes, and in two or more.
_BUT_FOUR = bytes(set(range(256)) - set(range(0xF0, 0xF8)))
_BUT_TWO = bytes(set(range(256)) - set(range(0xC4, 0xF8)))


class Bodies:
    """Reads bodies, as many at once as there is memory for.

    Args:
        most: bytes of one.
        memory: bytes that all may need together.
        gauge: told what they need.
    """

    def __init__(self, most: int, memory: int, gauge: Gauge) -> None:
        self._most, self._memory, self._gauge = most, memory, gauge
        self._held = 0

    @asynccontextmanager
    async def read(self, receive: Receive, weight: int = 1) -> AsyncIterator[Receive]:
        """The whole body, to be received again; its memory is kept free for it meanwhile.

        Args:
            receive: gives its parts.
            weight: how many times `PER_TEXT` is needed of a text.

        Raises:
            InvalidInput: it is no UTF-8.
            TooLarge: it is, or what would be made of it.
            TooSlow: it did not come within `READ_S` seconds.
            TooDeep: no request is nested like that.
            OutOfMemory: others need what it would.
        """
        holding = 0

        def hold(wanted: int) -> None:
            nonlocal holding
            if wanted > self._memory:
                raise TooLarge(
                    f"a request that takes {wanted / MB:,.0f} MB of memory to answer; wanted "
                    f"{self._memory / MB:g} at most: send fewer texts a request"
                )
            if self._held + wanted - holding > self._memory:
                raise OutOfMemory(
                    f"the requests under way take {self._held / MB:,.0f} MB of memory, and this "
                    f"one would take {wanted / MB:,.0f}; wanted {self._memory / MB:g} together: "
                    "try again, or send fewer texts a request"
                )
            self._held += wanted - holding
            holding = wanted
            self._gauge.set(self._held)

        async def whole() -> Message:
            parts: list[bytes] = []
            size = 0
            while True:
                message = await receive()
                if message["type"] != "http.request":  # the caller went away
                    return message
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                if size > self._most:
                    raise TooLarge(
                        f"a body of more than {self._most / MB:g} MB: send fewer texts a request"
                    )
                hold((1 + _COPIES) * size)
                if not message.get("more_body"):
                    return {**message, "body": b"".join(parts)}

        try:
            try:
                with anyio.fail_after(READ_S):
                    message = await whole()
            except TimeoutError:
                raise TooSlow(f"no whole body within {READ_S:g} s: send it faster") from None
            hold(need(message.get("body", b""), self._memory, weight))
            waiting = [message]

            async def again() -> Message:
                return waiting.pop() if waiting else await receive()

            yield again
        finally:
            self._held -= holding
            self._gauge.set(self._held)


def need(body: bytes, most: int, weight: int = 1) -> int:
    """Bytes of memory that a request of this body is taken to need.

    Nothing is parsed: strings are taken out, and what is left is counted. It stops counting where
    there is more than `most`. Of a text it takes `weight` times `PER_TEXT`.

    Raises:
        InvalidInput: it is UTF-16 or UTF-32, of which none of this would hold.
        TooDeep: it is nested deeper than `MOST_DEPTH`.
    """
    if detect_encoding(body) not in ("utf-8", "utf-8-sig"):  # as the parser takes it
        raise InvalidInput("body: wanted JSON in UTF-8")
    per_text = weight * PER_TEXT
    plain = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    found = (1 + _COPIES * _width(body)) * len(body) + per_text * (plain.count(b'"') // 2)
    if found > most:
        return found
    outside = _STRING.sub(b"", plain)
    brackets = outside.translate(_BRACKETS, _NO_BRACKETS)
    found += per_text * brackets.count(b"[") + _PER_VALUE * outside.count(b",")
    # The innermost pairs go, a level at a time.
    for _ in range(MOST_DEPTH):
        brackets = brackets.replace(b"[]", b"")
    if brackets:
        raise TooDeep(f"body: no JSON, or nested deeper than {MOST_DEPTH} levels")
    return found


def _width(body: bytes) -> int:
    """Bytes of a character in memory: one wide character makes all of its string as wide."""
    if body.translate(None, _BUT_FOUR) or b"\\ud" in body or b"\\uD" in body:
        return 4
    return 2 if body.translate(None, _BUT_TWO) or b"\\u" in body else 1
