# SPDX-License-Identifier: Apache-2.0
"""uvicorn's HTTP, with an end to headers: httptools collects them for as long as they come."""

from __future__ import annotations

from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MOST_HEAD = 65_536  # bytes, as uvicorn's other HTTP has it


class CappedProtocol(HttpToolsProtocol):
    """Hangs up on whoever sends more than `MOST_HEAD` bytes that are neither a body nor an end."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head = 0

    def data_received(self, data: bytes) -> None:
        """Parses; counts what is left of headers, and of trailers."""
        self._head += len(data)
        super().data_received(data)
        if self._head > MOST_HEAD:
            self.transport.close()

    def on_headers_complete(self) -> None:
        """The head is over."""
        self._head = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """What came was of the body."""
        self._head = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """So is the request."""
        self._head = 0
        super().on_message_complete()
