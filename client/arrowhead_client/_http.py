# SPDX-License-Identifier: Apache-2.0
"""HTTP, blocking and async. Foreign errors become ours in `_translated` only.

tritonclient writes and reads the bodies. Its blocking HTTP client is not used to send them: it may
not be shared by threads, and in each thread that calls, gevent leaves an event loop behind with two
open files, for ever. urllib3 sends them, over connections that threads share; gevent never runs.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing, contextmanager, suppress
from typing import Any, TypeVar
from urllib.parse import quote
from weakref import WeakKeyDictionary

import aiohttp
import tritonclient.http as wire
import tritonclient.http.aio as async_wire
from urllib3 import BaseHTTPResponse, Timeout, connection_from_url
from urllib3 import exceptions as pool_errors
from urllib3.connection import HTTPConnection

from arrowhead_client._errors import (
    ClientClosed,
    InvalidUrl,
    ServerError,
    TimedOut,
    from_status,
    timed_out,
    unavailable,
    unexpected,
)
from arrowhead_client._info import Config
from arrowhead_client._plan import Answer, Request
from arrowhead_client._transports import AsyncTransport, Transport, config_in, embedding_width
from arrowhead_client._url import Endpoint, parse_url

T = TypeVar("T")

_HEAD_SIZE = "Inference-Header-Content-Length"  # of a body, the part that is JSON
_KEPT = 256  # idle connections; one above is opened all the same, and closed after its request


class _Connection(HTTPConnection):
    """A connection that enters itself in `made`, so that `close` finds it while it is in use."""

    def __init__(self, *, made: WeakKeyDictionary[_Connection, None], **settings: Any) -> None:
        super().__init__(**settings)
        made[self] = None


class HttpTransport(Transport):
    """Blocking HTTP, over connections that are kept and that all threads share.

    A server that drips a body may hold a request for up to twice its `timeout_s`; one that drips
    the head of an answer, or of a chunk, longer: each read is given the time that was left.

    Args:
        url: `http://host[:port]`.
        binary: send and ask for raw tensors after the JSON; False keeps all in the JSON, which is
            slower and readable.
    """

    def __init__(self, url: str, *, binary: bool = True) -> None:
        self._server = _endpoint(url)
        self._binary = binary
        self._connections: WeakKeyDictionary[_Connection, None] = WeakKeyDictionary()
        with _translated(self._server, 0):
            self._pool = connection_from_url(
                str(self._server), maxsize=_KEPT, retries=False, made=self._connections
            )
        self._pool.ConnectionCls = _Connection

    def infer(self, request: Request, timeout_s: float) -> Answer:
        """See `Transport.infer`."""
        call = _call(request, self._binary)
        path = f"/v2/models/{quote(call.pop('model_name'), safe='')}"
        if version := call.pop("model_version"):
            path += f"/versions/{version}"
        body, head_size = wire.InferenceServerClient.generate_request_body(**call)
        headers = {} if head_size is None else {_HEAD_SIZE: str(head_size)}
        with _translated(self._server, timeout_s):
            response, content = self._exchange("POST", f"{path}/infer", timeout_s, body, headers)
            self._check(response, content, timeout_s)
            result = wire.InferenceServerClient.parse_response_body(
                content, header_length=response.headers.get(_HEAD_SIZE)
            )
            return _answer(request, result)

    def is_ready(self, model: str, timeout_s: float) -> bool:
        """See `Transport.is_ready`."""
        with _translated(self._server, timeout_s):
            return all(
                self._exchange("GET", path, timeout_s)[0].status == 200
                for path in ("/v2/health/ready", f"/v2/models/{quote(model, safe='')}/ready")
            )

    def width(self, model: str, timeout_s: float) -> int:
        """See `Transport.width`."""
        with _translated(self._server, timeout_s):
            shapes = _shapes(self._get(f"/v2/models/{quote(model, safe='')}", timeout_s))
        return embedding_width(shapes, str(self._server), model)

    def config(self, model: str, timeout_s: float) -> Config:
        """See `Transport.config`."""
        with _translated(self._server, timeout_s):
            return _config(self._get(f"/v2/models/{quote(model, safe='')}/config", timeout_s))

    def close(self) -> None:
        """See `Transport.close`."""
        self._pool.close()
        for reference in self._connections.keyrefs():  # a copy: threads may add meanwhile
            with suppress(OSError, AttributeError):  # just closed, or not yet open
                reference().sock.shutdown(socket.SHUT_RDWR)  # type: ignore[union-attr]

    def _get(self, path: str, timeout_s: float) -> Any:
        """The JSON at this path."""
        response, content = self._exchange("GET", path, timeout_s)
        self._check(response, content, timeout_s)
        return json.loads(content)

    def _exchange(
        self,
        method: str,
        path: str,
        timeout_s: float,
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
    ) -> tuple[BaseHTTPResponse, bytes]:
        """One request and its whole answer."""
        deadline = time.monotonic() + timeout_s
        timeout = Timeout(total=timeout_s)
        response = self._pool.urlopen(
            method, path, body, headers, redirect=False, timeout=timeout, preload_content=False
        )
        content = bytearray()
        with closing(response):  # read to its end, it has given its connection back before
            while chunk := response.read1(1 << 20):
                content += chunk
                if time.monotonic() > deadline:
                    raise TimeoutError
        return response, bytes(content)

    def _check(self, response: BaseHTTPResponse, content: bytes, timeout_s: float) -> None:
        if response.status == 200:
            return
        try:
            message = str(json.loads(content)["error"])
        except (ValueError, KeyError, TypeError):  # not Triton's words: a proxy's page
            message = response.reason or ""
        raise from_status(
            str(response.status), message, server=str(self._server), timeout_s=timeout_s
        )


class AsyncHttpTransport(AsyncTransport):
    """HTTP for asyncio. The session is made at the first request, in the loop that sends it.

    Args:
        url: `http://host[:port]`.
        binary: see `HttpTransport`.
    """

    def __init__(self, url: str, *, binary: bool = True) -> None:
        self._server = _endpoint(url)
        self._binary = binary
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

    async def config(self, model: str, timeout_s: float) -> Config:
        """See `Transport.config`."""

        async def config(client: Any) -> Config:
            return _config(await client.get_model_config(model))

        return await self._send(timeout_s, config)

    async def close(self) -> None:
        """See `Transport.close`."""
        if self._client is not None:
            await self._client.close()

    async def _send(self, timeout_s: float, call: Callable[[Any], Awaitable[T]]) -> T:
        if self._client is None:
            self._client = async_wire.InferenceServerClient(
                self._server.address, conn_limit=0, conn_timeout=None
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
    inputs = [
        wire.InferInput(name, list(array.shape), kind).set_data_from_numpy(array, binary)
        for name, kind, array in request.inputs()
    ]
    outputs = [wire.InferRequestedOutput(name, binary_data=binary) for name in request.outputs]
    return {
        "model_name": request.model,
        "model_version": str(request.version or ""),
        "inputs": inputs,
        "outputs": outputs,
    }


def _answer(request: Request, result: Any) -> Answer:
    arrays = {name: result.as_numpy(name) for name in request.outputs}
    return {name: array for name, array in arrays.items() if array is not None}


def _shapes(metadata: Any) -> dict[str, Any]:
    return {output["name"]: output["shape"] for output in metadata["outputs"]}


def _config(config: Any) -> Config:
    # dict(...): what is none is a TypeError or a ValueError, which `_translated` knows
    parameters = dict(dict(config).get("parameters", {}))
    steps = dict(config.get("ensemble_scheduling", {})).get("step", [])
    return config_in(
        {key: str(value["string_value"]) for key, value in parameters.items()},
        [(str(step["model_name"]), int(step["model_version"])) for step in steps],
    )


@contextmanager
def _translated(server: Endpoint, timeout_s: float) -> Iterator[None]:
    try:
        try:
            yield
        except (pool_errors.ProtocolError, pool_errors.NewConnectionError) as error:
            raise error.__context__ or error from None  # urllib3 says where; what it met says why
    except ServerError:
        raise
    except wire.InferenceServerException as error:
        raise from_status(
            error.status(), error.message() or "", server=str(server), timeout_s=timeout_s
        ) from error
    except pool_errors.ClosedPoolError as error:
        raise ClientClosed("this client was closed during the call") from error
    except pool_errors.LocationParseError as error:
        raise InvalidUrl(f"invalid url {str(server)!r}: {error}") from error
    except (TimeoutError, pool_errors.TimeoutError) as error:
        raise timed_out(str(server), timeout_s) from error
    except (OSError, aiohttp.ClientConnectionError, http.client.IncompleteRead) as error:
        raise unavailable(str(server), error) from error
    except (http.client.HTTPException, aiohttp.ClientError, pool_errors.HTTPError) as error:
        raise unexpected(str(server), error) from error
    except (ValueError, KeyError, TypeError) as error:  # a 200 with a body of something else
        raise unexpected(str(server), error) from error
