# SPDX-License-Identifier: Apache-2.0
"""What balancers and schedulers ask: does the process live, may requests come, what happened.

    GET /live      200 if the thread that looks after Triton does; 503 once that has done nothing
                   for `SILENT_S`: it will not come back by itself, start all anew
    GET /ready     200 if requests may come, else 503: {"state": ..., "reason": ...}
    GET /metrics   state, restarts and models, for Prometheus

A port of its own: while Triton is dead, frozen or on its way out, its own ports cannot say so.
Whoever reaches it can make it neither keep a thread for ever nor as many as they like.
"""

from __future__ import annotations

import json
import logging
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from enum import Enum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Protocol

from arrowhead_server.address import Address
from arrowhead_server.errors import PortInUseError
from arrowhead_server.repository import EmbeddingModel

LOGGER = logging.getLogger(__name__)
# That thread waits for a second at most, and copies and removes files: a slow disk takes less.
SILENT_S = 60.0
_IDLE_S = 5.0  # a caller that sends nothing for so long is hung up on
_REQUEST_S = 10.0  # and one whose request is not over so long after the last one was
_MOST_CONNECTIONS = 64


class Condition(str, Enum):
    """What a server is doing. Requests may come in one of these only."""

    STARTING = "starting"
    READY = "ready"
    HANGING = "hanging"  # Triton or a model answers nobody; started anew if it stays so
    RECOVERING = "recovering"  # Triton or a model died, or was hanging, and is being started anew
    DRAINING = "draining"  # asked to stop; still answers, for those who have not heard of it
    STOPPING = "stopping"


class Watched(Protocol):
    """What is asked of a `Server`, from threads of our own."""

    @property
    def restart_count(self) -> int:
        """How often Triton was started anew."""
        ...

    @property
    def recovery_s(self) -> float:
        """The seconds that all restarts took together."""
        ...

    @property
    def models(self) -> tuple[EmbeddingModel, ...]:
        """What is served now."""
        ...

    def condition(self) -> tuple[Condition, str]:
        """What it is doing, and why it is not ready ("" if it is)."""
        ...

    def silent_s(self) -> float:
        """The seconds since its own thread last did anything."""
        ...


@contextmanager
def serving(watched: Watched, address: Address) -> Iterator[None]:
    """Answers at `address.health_port` meanwhile.

    Raises:
        PortInUseError: Somebody listens there.
    """
    pages: dict[str, Callable[[], tuple[int, str, bytes]]] = {
        "/live": lambda: _live(watched),
        "/ready": lambda: _ready(watched),
        "/metrics": lambda: _metrics(watched),
    }
    try:
        server = _Server((address.host, address.health_port), pages)
    except OSError as error:
        raise PortInUseError(
            f"cannot listen on {address.host}:{address.health_port} ({error.strerror}): "
            "choose another port with --health-port"
        ) from error
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), name="arrowhead-health")
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _live(watched: Watched) -> tuple[int, str, bytes]:
    silent_s = watched.silent_s()
    if silent_s < SILENT_S:
        return 200, "application/json", b"{}"
    reason = f"the thread that looks after Triton has done nothing for {silent_s:.0f} s"
    return 503, "application/json", json.dumps({"reason": reason}).encode()


def _ready(watched: Watched) -> tuple[int, str, bytes]:
    condition, reason = watched.condition()
    body = {"state": condition.value} | ({"reason": reason} if reason else {})
    status = 200 if condition is Condition.READY else 503
    return status, "application/json", json.dumps(body).encode()


def _metrics(watched: Watched) -> tuple[int, str, bytes]:
    # Who is not scraped does not pay for it: 40 ms of the start, 3 MB.
    from arrowhead_server.health_metrics import page

    return page(watched)


class _Server(ThreadingHTTPServer):
    request_queue_size = 128  # of 5, a burst from anybody makes balancers wait
    daemon_threads = True  # a slow caller does not hold up our end
    block_on_close = False

    def __init__(
        self, address: tuple[str, int], pages: dict[str, Callable[[], tuple[int, str, bytes]]]
    ) -> None:
        self.pages = pages
        # Each connection that has a thread, and since when its caller is waited for, the longest
        # first; None where we have hung up and the thread is about to end.
        self._since: dict[socket.socket, float | None] = {}
        self._lock = threading.Lock()
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        """As any server: HTTPServer would ask DNS for our name, and wait for its answer."""
        socketserver.TCPServer.server_bind(self)

    def verify_request(self, request: Any, client_address: object) -> bool:
        """Makes room for a new caller: who has taken longest goes, and never the one who comes.

        Else strangers who send nothing would shut balancers out.
        """
        with self._lock:
            waited_for = [line for line, since in self._since.items() if since is not None]
            if len(waited_for) >= _MOST_CONNECTIONS:
                self._hang_up(waited_for[0])
            if len(self._since) >= 2 * _MOST_CONNECTIONS:
                return False  # threads that are to end have not yet
            self._since[request] = time.monotonic()
            return True

    def awaits(self, request: socket.socket) -> None:
        """Another request is to come over this connection."""
        with self._lock:
            del self._since[request]
            self._since[request] = time.monotonic()

    def service_actions(self) -> None:
        """Between two callers, twenty times a second."""
        latest = time.monotonic() - _REQUEST_S
        with self._lock:
            for request, since in self._since.items():
                if since is not None and since < latest:
                    self._hang_up(request)

    def shutdown_request(self, request: Any) -> None:
        """The end of a connection, and of its thread."""
        with self._lock:
            self._since.pop(request, None)
        super().shutdown_request(request)

    def _hang_up(self, request: socket.socket) -> None:
        """Wakes the connection's thread, wherever it waits for its caller."""
        self._since[request] = None
        with suppress(OSError):  # the caller is gone
            request.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: object, client_address: object) -> None:
        # Mostly callers that hang up. The default prints a traceback for each.
        LOGGER.debug("a question about health ended early", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "arrowhead"
    sys_version = ""
    timeout = _IDLE_S
    server: _Server

    def handle_one_request(self) -> None:
        """One of those that come over a connection."""
        self.server.awaits(self.request)
        super().handle_one_request()

    def do_GET(self) -> None:
        page = self.server.pages.get(self.path.partition("?")[0])
        if page is None:
            paths = ", ".join(self.server.pages)
            error = json.dumps({"error": f"there is no {self.path!r} here: wanted {paths}"})
            status, kind, body = 404, "application/json", error.encode()
        else:
            status, kind, body = page()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_GET  # noqa: N815 (the base's name)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (the base's name)
        """Asked several times a second: not worth a line."""
