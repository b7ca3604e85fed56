# SPDX-License-Identifier: Apache-2.0
"""A hostile server on a real connection: what it sends, how slowly, and how it ends.

Each input is one connection, or as many as the client opens. The client, whichever protocol and
manner, must be done when its time is over.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from hypothesis import strategies as st

from arrowhead_client import ArrowheadError, AsyncClient, Client
from perf.fuzz.answers import check_told
from perf.fuzz.target import Check, Target

TIMEOUT_S = 0.4
LATE_S = 1.5  # what scheduling may add on a busy machine
_MOST_S = 4.0  # that the server goes on
_WIDTH = 8

_VECTOR = np.arange(1, _WIDTH + 1, dtype="<f4").tobytes()
_HEAD = (
    b'{"outputs":[{"name":"embeddings","datatype":"FP32","shape":[1,8],'
    b'"parameters":{"binary_data_size":32}}]}'
)
_BODY = _HEAD + _VECTOR
_SIZE = b"Inference-Header-Content-Length: %d\r\n" % len(_HEAD)
_SOUND = b"HTTP/1.1 200 OK\r\n" + _SIZE + b"Content-Length: %d\r\n\r\n" % len(_BODY) + _BODY


class Piece(NamedTuple):
    """Bytes, and seconds of silence after them."""

    raw: bytes
    pause_s: float


class Script(NamedTuple):
    """What the server does with every connection.

    Attributes:
        client: which one calls: "http", "async http", "grpc" or "async grpc".
        pieces: what is sent. endless: the last one again and again.
        end: how it ends: "close", "reset", or "hold", which says nothing more.
    """

    client: str
    pieces: tuple[Piece, ...]
    endless: bool
    end: str


_STATUS_LINES = st.sampled_from(
    [
        *(
            b"HTTP/1.1 200 OK\r\n",
            b"HTTP/1.1 200\r\n",
            b"HTTP/1.0 200 OK\r\n",
            b"HTTP/2 200 OK\r\n",
        ),
        *(
            b"HTTP/1.1 100 Continue\r\n",
            b"HTTP/1.1 101 Switching Protocols\r\n",
            b"HTTP/1.1 204 \r\n",
        ),
        *(
            b"HTTP/1.1 999 \xff\r\n",
            b"HTTP/1.1 0 x\r\n",
            b"HTTP/1.1 -1 x\r\n",
            b"HTTP/1.1 2e2 x\r\n",
        ),
        *(b"HTTP/1.1 301 x\r\nLocation: http://[\r\n", b"HTTP/1.1 503 Busy\r\n", b"ICY 200 OK\r\n"),
        *(b"\r\n", b"", b"HTTP/1.1 400 \x1b[2Jred\r\n", b"HTTP/1.1 200 " + b"a" * 70_000 + b"\r\n"),
    ]
)
_HEADERS = st.sampled_from(
    [
        *(_SIZE, b"Inference-Header-Content-Length: -1\r\n", b"Content-Length: -5\r\n"),
        *(b"Content-Length: %d\r\n" % len(_BODY), b"Content-Length: 99999999999999999999\r\n"),
        *(b"Content-Length: x\r\n", b"Content-Length: 10\r\nContent-Length: 11\r\n"),
        *(
            b"Transfer-Encoding: chunked\r\n",
            b"Transfer-Encoding: gzip, chunked\r\n",
            b"no colon\r\n",
        ),
        *(
            b"Content-Encoding: gzip\r\n",
            b"Content-Encoding: deflate\r\n",
            b"Content-Encoding: br\r\n",
        ),
        *(
            b"Connection: close\r\n",
            b": empty\r\n",
            b" folded\r\n",
            b"X: \x00\xff\r\n",
            b"\xff: x\r\n",
        ),
        *(b"X: " + b"a" * 70_000 + b"\r\n", b"X: y\r\n" * 300, b"Set-Cookie: a=b; c\r\n", b"\n"),
    ]
)
_BODIES = st.sampled_from(
    [
        *(
            _BODY,
            _BODY[:-1],
            _BODY + b"\0",
            b"",
            b"{}",
            b"[" * 100_000,
            b"\x1f\x8b\x08" + b"\0" * 30,
        ),
        *(
            b"%x\r\n%b\r\n0\r\n\r\n" % (len(_BODY), _BODY),
            b"ffffffffffffffff\r\n",
            b"-1\r\n",
            b"x\r\n",
        ),
        *(
            b"1;" + b"a" * 70_000,
            b"0\r\n" + b"X: y\r\n" * 20_000,
            b'{"error": "\x1b[31m"}',
            b"\xff" * 99,
        ),
    ]
)
_GRPC = st.sampled_from(
    [
        b"\x00\x00\x00\x04\x00\x00\x00\x00\x00",  # settings
        b"\x00\x00\x00\x04\x01\x00\x00\x00\x00",  # their acknowledgement
        b"\x00\x00\x08\x07\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x0b",  # going away
        b"\x00\x00\x04\x03\x00\x00\x00\x00\x01\x00\x00\x00\x08",  # a stream reset
        b"\xff\xff\xff\x00\x00\x00\x00\x00\x01" + b"\0" * 100,  # data without end
        b"\x00\x00\x08\x06\x00\x00\x00\x00\x00" + b"p" * 8,  # a ping
        b"\x00\x00\x05\x01\x04\x00\x00\x00\x01\x88\x5f\x01a\xff",  # headers
    ]
)
_HTTP_ANSWER = st.builds(
    lambda first, headers, body: first + b"".join(headers) + b"\r\n" + body,
    _STATUS_LINES,
    st.lists(_HEADERS, max_size=4),
    _BODIES,
)
_RAW = st.one_of(
    _HTTP_ANSWER,
    _HTTP_ANSWER,
    st.just(_SOUND),
    st.builds(lambda cut: _SOUND[:cut], st.integers(0, len(_SOUND))),
    _GRPC,
    st.binary(max_size=64),
    st.just(b"HTTP/1.1 100 Continue\r\n\r\n"),
)
_PAUSES = st.sampled_from([0.0, 0.0, 0.0, 0.05, 0.3])
_SCRIPTS = st.builds(
    Script,
    st.sampled_from(["http", "http", "async http", "async http", "grpc", "async grpc"]),
    st.lists(st.builds(Piece, _RAW, _PAUSES), max_size=4).map(tuple),
    st.sampled_from([False, False, False, True]),
    st.sampled_from(["close", "close", "hold", "reset"]),
)


class Listener:
    """Takes connections on a free port of loopback, and gives each to `met`, in one thread."""

    def __init__(self) -> None:
        self._listening = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port = self._listening.getsockname()[1]
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def met(self, line: socket.socket) -> None:
        """What becomes of a connection; must not take long."""
        raise NotImplementedError

    def stop(self) -> None:
        """No more connections."""
        with suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self._thread.join()

    def _accept(self) -> None:
        while True:
            try:
                line, _ = self._listening.accept()
            except OSError:
                return
            self.met(line)


class HostileServer(Listener):
    """Plays the script of the moment to every connection."""

    def __init__(self) -> None:
        self.script = Script("http", (), False, "close")
        self._over = threading.Event()
        super().__init__()

    def play(self, script: Script) -> None:
        """What new connections meet; those of the script before end."""
        self._over.set()
        self._over = threading.Event()
        self.script = script

    def stop(self) -> None:
        """Those that are there end, and no more come."""
        self._over.set()
        super().stop()

    def met(self, line: socket.socket) -> None:
        """Plays to it, beside the others."""
        threading.Thread(
            target=self._answer, args=(line, self.script, self._over), daemon=True
        ).start()

    def _answer(self, line: socket.socket, script: Script, over: threading.Event) -> None:
        with line, suppress(OSError):
            line.settimeout(_MOST_S)
            line.recv(65_536)
            for piece in script.pieces:
                line.sendall(piece.raw)
                over.wait(piece.pause_s)
            ends = time.monotonic() + _MOST_S
            while script.endless and script.pieces and not over.is_set():
                line.sendall(script.pieces[-1].raw)
                if over.wait(script.pieces[-1].pause_s) or time.monotonic() > ends:
                    break
            if script.end == "hold":
                over.wait(_MOST_S)
            if script.end == "close":
                line.shutdown(socket.SHUT_WR)
                while line.recv(65_536):  # what is left unread would make it a reset
                    pass
            if script.end == "reset":
                line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


@contextmanager
def _opened(repository: Path) -> Iterator[Check]:
    server = HostileServer()

    def check(script: Script) -> None:
        server.play(script)
        began = time.monotonic()
        try:
            vector = _embedded(script.client, server.port)
        except ArrowheadError as error:
            check_told(error)
        else:
            sent = b"".join(piece.raw for piece in script.pieces + script.pieces[-1:])
            assert vector.tobytes() in sent, "a vector that nobody sent"
        took = time.monotonic() - began
        assert took < TIMEOUT_S + LATE_S, f"{took:.1f} s, with a timeout of {TIMEOUT_S} s"

    yield check
    server.stop()


def _embedded(client: str, port: int) -> Any:
    protocol = client.rpartition(" ")[2]
    url, settings = f"{protocol}://127.0.0.1:{port}", {"timeout_s": TIMEOUT_S, "retries": 1}
    if not client.startswith("async"):
        with Client(url, **settings) as asking:  # type: ignore[arg-type]
            return asking.embed("a")

    async def embedded() -> Any:
        async with AsyncClient(url, **settings) as asking:  # type: ignore[arg-type]
            return await asking.embed("a")

    return asyncio.run(embedded())


LINES = Target(
    "client: a hostile server",
    "An error of the client's tree in time, or the very vector that was sent.",
    _SCRIPTS,
    _opened,
    found=(
        # Each read met something, so none timed out.
        Script("http", (Piece(b"HTTP/1.1 100 Continue\r\n\r\n", 0.05),), True, "hold"),
        Script(
            "http",
            (Piece(b"HTTP/1.1 200 OK\r\n", 0.0), Piece(b"X: y\r\n", 0.3)),
            True,
            "hold",
        ),
        Script(
            "http",
            (Piece(b"HTTP/1.1 400 \x1b[2Jred\r\nContent-Length: 0\r\n\r\n", 0.0),),
            False,
            "close",
        ),
    ),
    guided=False,
)
