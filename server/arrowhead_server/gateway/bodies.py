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

import anyio
from prometheus_client import Gauge
from starlette.types import Message, Receive

from arrowhead_server.gateway.failures import OutOfMemory, TooDeep, TooLarge, TooSlow

MB = 10**6
MOST_DEPTH = 16  # of JSON; the requests that there are have 3 at most
READ_S = 30.0
# What a request is taken to need. Of a text, or a list of ids: its vector of some hundred to a
# thousand components, as numbers and as JSON. Of a byte: itself, and as a character of the decoded
# body, of its text, and of its text with a prompt in front.
PER_TEXT, _PER_VALUE, _COPIES = 32_768, 64, 3

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
    async def read(self, receive: Receive) -> AsyncIterator[Receive]:
        """The whole body, to be received again; its memory is kept free for it meanwhile.

        Raises:
            TooLarge: it is, or what would be made of it.
            TooSlow: it did not come within `READ_S` seconds.
            TooDeep: no request is nested like that.
            OutOfMemory: others need what it would.
        """
        holding = 0

        def hold(need: int) -> None:
            nonlocal holding
            if need > self._memory:
                raise TooLarge(
                    f"a request that takes {need / MB:,.0f} MB of memory to answer; wanted "
                    f"{self._memory / MB:g} at most: send fewer texts a request"
                )
            if self._held + need - holding > self._memory:
                raise OutOfMemory(
                    f"the requests under way take {self._held / MB:,.0f} MB of memory, and this "
                    f"one would take {need / MB:,.0f}; wanted {self._memory / MB:g} together: try "
                    "again, or send fewer texts a request"
                )
            self._held += need - holding
            holding = need
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
            hold(need(message.get("body", b""), self._memory))
            waiting = [message]

            async def again() -> Message:
                return waiting.pop() if waiting else await receive()

            yield again
        finally:
            self._held -= holding
            self._gauge.set(self._held)


def need(body: bytes, most: int) -> int:
    """Bytes of memory that a request of this body is taken to need.

    Nothing is parsed: strings are taken out, and what is left is counted. It stops counting where
    there is more than `most`.

    Raises:
        TooDeep: it is nested deeper than `MOST_DEPTH`.
    """
    plain = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    found = (1 + _COPIES * _width(body)) * len(body) + PER_TEXT * (plain.count(b'"') // 2)
    if found > most:
        return found
    outside = _STRING.sub(b"", plain)
    brackets = outside.translate(_BRACKETS, _NO_BRACKETS)
    found += PER_TEXT * brackets.count(b"[") + _PER_VALUE * outside.count(b",")
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
