# SPDX-License-Identifier: Apache-2.0
"""HTTP, blocking (gevent) and async (aiohttp). Foreign errors become ours in `_translated` only.

tritonclient's blocking client is not thread-safe and its sockets belong to the thread that opened
them. So each thread that calls gets a client of its own, and several requests in flight are
greenlets of the calling thread: no thread of ours ever holds a socket.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import aiohttp
import gevent
import numpy as np
import tritonclient.http as wire
import tritonclient.http.aio as async_wire
from geventhttpclient.response import HTTPConnectionClosed, HTTPParseError

from arrowhead_client._errors import (
    InvalidUrl,
    TimedOut,
    from_status,
    timed_out,
    unavailable,
    unexpected,
)
from arrowhead_client._plan import Answer, Request
from arrowhead_client._transports import AsyncTransport, Task, Transport, embedding_width
from arrowhead_client._url import Endpoint, parse_url

T = TypeVar("T")


class HttpTransport(Transport):
    """Blocking HTTP.

    Args:
        url: `http://host[:port]`.
        binary: send and ask for raw tensors after the JSON; False keeps all in the JSON, which is
            slower and readable.
        connections: connections of each calling thread; more requests than these wait for one.
    """

    def __init__(self, url: str, *, binary: bool = True, connections: int = 4) -> None:
        self._server = _endpoint(url)
        self._binary = binary
        self._connections = connections
        self._mine = threading.local()

    def infer(self, request: Request, timeout_s: float) -> Answer:
        """See `Transport.infer`."""
        call = _call(request, self._binary)
        return self._send(timeout_s, lambda client: _answer(request, client.infer(**call)))

    def is_ready(self, model: str, timeout_s: float) -> bool:
        """See `Transport.is_ready`."""
        return self._send(
            timeout_s,
            lambda client: bool(client.is_server_ready() and client.is_model_ready(model)),
        )

    def width(self, model: str, timeout_s: float) -> int:
        """See `Transport.width`."""
        metadata = self._send(timeout_s, lambda client: client.get_model_metadata(model))
        return embedding_width(_shapes(metadata), str(self._server), model)

    def close(self) -> None:
        """Closes this thread's connections; another thread's are closed when that thread ends."""
        self._drop()

    def run(self, tasks: Iterable[Task], concurrency: int) -> Iterator[tuple[int, Answer]]:
        """See `Transport.run`; here the requests in flight are cancelled too."""

        def outcome(task: Task) -> Answer | Exception:
            try:
                return task(gevent.sleep)
            except Exception as error:  # noqa: BLE001 (raised below; else gevent prints it)
                return error

        todo = iter(enumerate(tasks))
        running: dict[gevent.Greenlet, int] = {}
        try:
            while True:
                while len(running) < concurrency and (job := next(todo, None)) is not None:
                    running[gevent.spawn(outcome, job[1])] = job[0]
                if not running:
                    return
                for done in gevent.wait(list(running), count=1):
                    index, answer = running.pop(done), done.value
                    if isinstance(answer, Exception):
                        raise answer
                    yield index, answer
        finally:
            if running:
                gevent.killall(list(running))
                self._drop()

    def _send(self, timeout_s: float, call: Callable[[Any], T]) -> T:
        client = getattr(self._mine, "client", None)
        if client is None:
            # No timeouts here: they would hold for each read alone. `_translated` holds the whole.
            client = self._mine.client = wire.InferenceServerClient(
                self._server.address,
                concurrency=self._connections,
                connection_timeout=None,
                network_timeout=None,
            )
        timer = gevent.Timeout(timeout_s)
        try:
            with timer, _translated(self._server, timeout_s):
                return call(client)
        except gevent.Timeout as met:
            if met is not timer:
                raise
            self._drop()  # a socket given up while it sends is never given back to its pool
            raise timed_out(str(self._server), timeout_s) from None

    def _drop(self) -> None:
        client = self._mine.__dict__.pop("client", None)
        if client is not None:
            client.close()


class AsyncHttpTransport(AsyncTransport):
    """HTTP for asyncio. The session is made at the first request, in the loop that sends it.

    Args:
        url: `http://host[:port]`.
        binary: see `HttpTransport`.
        connections: connections; more requests than these wait for one.
    """

    def __init__(self, url: str, *, binary: bool = True, connections: int = 4) -> None:
        self._server = _endpoint(url)
        self._binary = binary
        self._connections = connections
        self._client: Any = None

    async def infer(self, request: Request, timeout_s: float) -> Answer:
        """See `Transport.infer`."""
        call = _call(request, self._binary)

        async def infer(client: Any) -> Answer:
            return _answer(request, await client.infer(**call))

        return await self._send(timeout_s, infer)

    async def is_ready(self, model: str, timeout_s: float) -> bool:
        """See `Transport.is_ready`."""

        async def both(client: Any) -> bool:
            return bool(await client.is_server_ready() and await client.is_model_ready(model))

        return await self._send(timeout_s, both)

    async def width(self, model: str, timeout_s: float) -> int:
        """See `Transport.width`."""
        metadata = await self._send(timeout_s, lambda client: client.get_model_metadata(model))
        return embedding_width(_shapes(metadata), str(self._server), model)

    async def close(self) -> None:
        """See `Transport.close`."""
        if self._client is not None:
            await self._client.close()

    async def _send(self, timeout_s: float, call: Callable[[Any], Awaitable[T]]) -> T:
        if self._client is None:
            self._client = async_wire.InferenceServerClient(
                self._server.address, conn_limit=self._connections, conn_timeout=None
            )

        async def translated() -> T:
            with _translated(self._server, timeout_s):
                return await call(self._client)

        try:
            return await asyncio.wait_for(translated(), timeout_s)
        except TimedOut:
            raise
        except asyncio.TimeoutError:
            raise timed_out(str(self._server), timeout_s) from None


def _endpoint(url: str) -> Endpoint:
    endpoint = parse_url(url)
    if endpoint.protocol != "http":
        raise InvalidUrl(f"invalid url {url!r} for HTTP: wanted http://host[:port]")
    return endpoint


def _call(request: Request, binary: bool) -> dict[str, Any]:
    texts = np.array(request.texts, dtype=np.object_).reshape(-1, 1)  # [B, 1]
    tensor = wire.InferInput("text", list(texts.shape), "BYTES")
    tensor.set_data_from_numpy(texts, binary_data=binary)
    outputs = [wire.InferRequestedOutput(name, binary_data=binary) for name in request.outputs]
    return {"model_name": request.model, "inputs": [tensor], "outputs": outputs}


def _answer(request: Request, result: Any) -> Answer:
    arrays = {name: result.as_numpy(name) for name in request.outputs}
    return {name: array for name, array in arrays.items() if array is not None}


def _shapes(metadata: Any) -> dict[str, Any]:
    return {output["name"]: output["shape"] for output in metadata["outputs"]}


@contextmanager
def _translated(server: Endpoint, timeout_s: float) -> Iterator[None]:
    try:
        yield
    except wire.InferenceServerException as error:
        raise from_status(
            error.status(), error.message() or "", server=str(server), timeout_s=timeout_s
        ) from error
    except (HTTPConnectionClosed, aiohttp.ServerDisconnectedError) as error:
        raise unavailable(str(server), error) from error
    except (HTTPParseError, aiohttp.ClientPayloadError, aiohttp.ClientResponseError) as error:
        raise unexpected(str(server), error) from error
    except (OSError, aiohttp.ClientConnectionError) as error:
        raise unavailable(str(server), error) from error
    except (ValueError, KeyError, TypeError) as error:  # a 200 with a body of something else
        raise unexpected(str(server), error) from error
