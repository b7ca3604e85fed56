# SPDX-License-Identifier: Apache-2.0
"""uvicorn's HTTP, with ends to what a connection may hold.

httptools collects headers for as long as they come, however slowly, uvicorn requests that wait
behind another, and asyncio an answer that nobody takes.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

MOST_HEAD = 65_536  # bytes, as uvicorn's other HTTP has it
MOST_PIPELINED = 16  # requests of a connection that are not answered yet
HEAD_S = 30.0  # for a head, from the connection's beginning or from its first byte
SEND_S = 30.0  # for so long what was sent may wait to be taken


class CappedProtocol(HttpToolsProtocol):
    """Hangs up on whoever makes it hold too much.

    That is more than `MOST_HEAD` bytes that are neither a body nor an end, more than
    `MOST_PIPELINED` requests at once, an answer of which nothing is taken for `SEND_S` seconds, or
    a head that is not there after `HEAD_S`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head = 0
        self._cycles: deque[RequestResponseCycle] = deque()
        self._hanging_up: asyncio.TimerHandle | None = None
        self._head_due: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Somebody is there, who may say nothing."""
        super().connection_made(transport)
        self._head_due = self.loop.call_later(HEAD_S, transport.abort)

    def data_received(self, data: bytes) -> None:
        """Parses; counts what is left of headers, and of trailers."""
        self._head += len(data)
        super().data_received(data)
        if self._head > MOST_HEAD:
            self.transport.close()

    def on_message_begin(self) -> None:
        """A head begins."""
        super().on_message_begin()
        if self._head_due is None:
            self._head_due = self.loop.call_later(HEAD_S, self.transport.abort)

    def on_headers_complete(self) -> None:
        """The head is over."""
        self._head = 0
        self._head_came()
        if len(self._cycles) == MOST_PIPELINED:
            self.transport.abort()
        if not self.transport.is_closing():
            super().on_headers_complete()
            self._cycles.append(self.cycle)

    def on_body(self, body: bytes) -> None:
        """What came was of the body."""
        self._head = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """So is the request."""
        self._head = 0
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """So is the answer; it may not have been taken yet."""
        self._cycles.popleft()
        super().on_response_complete()
        self._hang_up_if_closing()

    def timeout_keep_alive_handler(self) -> None:
        """Nothing more was asked."""
        super().timeout_keep_alive_handler()
        self._hang_up_if_closing()

    def pause_writing(self) -> None:
        """More waits to be taken than should."""
        super().pause_writing()
        self._hang_up_later()

    def resume_writing(self) -> None:
        """It was taken, or most of it."""
        super().resume_writing()
        self._keep_on()
        self._hang_up_if_closing()

    def connection_lost(self, exc: Exception | None) -> None:
        """All its requests end; uvicorn tells the last one only."""
        self._keep_on()
        self._head_came()
        for cycle in self._cycles:
            cycle.disconnected = True
            cycle.message_event.set()
        super().connection_lost(exc)

    def _hang_up_if_closing(self) -> None:
        # A transport that is closed waits for ever until the rest is taken. Without a parser it is
        # gone already.
        if self.transport.is_closing() and self.parser is not None:
            self._hang_up_later()

    def _hang_up_later(self) -> None:
        if self._hanging_up is None:
            self._hanging_up = self.loop.call_later(SEND_S, self.transport.abort)

    def _head_came(self) -> None:
        if self._head_due is not None:
            self._head_due.cancel()
            self._head_due = None

    def _keep_on(self) -> None:
        if self._hanging_up is not None:
            self._hanging_up.cancel()
            self._hanging_up = None
