# SPDX-License-Identifier: Apache-2.0
"""HTTP, blocking and async. Foreign errors become ours in `_translated` only.

urllib3 and aiohttp send the bodies, which are of the inference protocol with its binary extension:
a head of JSON, then the tensors' bytes. tritonclient's HTTP clients are not used: the blocking one
may not be shared by threads, and in each thread that calls, gevent leaves an event loop behind with
two open files, for ever; and both pack texts from arrays of objects, slowly.
"""

from __future__ import annotations

import asyncio
import http.client
import io
import json
import math
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote
from weakref import WeakKeyDictionary

import aiohttp
from urllib3 import Timeout, connection_from_url
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
from arrowhead_client._plan import Answer, Request, Tensor, is_request_id
from arrowhead_client._transports import AsyncTransport, Transport, config_in, embedding_width
from arrowhead_client._url import Endpoint, parse_url
from arrowhead_client._wire import MOST_BYTES, listed, read

_HEAD_SIZE = "Inference-Header-Content-Length"  # of a body, the part that is JSON
# The connection is gone, or was before all that was promised had come.
_CUT_OFF = (
    OSError,
    aiohttp.ClientConnectionError,
    http.client.IncompleteRead,
    aiohttp.http_exceptions.ContentLengthError,
)
# What reading a 200 raises where it is something else: JSON without an end, of a depth that no
# answer has, numbers that are none.
_NOT_AS_TOLD = (
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)
_KEPT = 256  # idle connections; one above is opened all the same, and closed after its request

T = TypeVar("T")


class _InTime(io.RawIOBase):
    """What comes over a socket, as long as the time lasts that was set for its next read.

    A socket's own timeout begins anew with each read: a byte now and then would hold a call for
    ever.
    """

    def __init__(self, sock: socket.socket) -> None:
        super().__init__()
        self._sock, self._raw = sock, sock.makefile("rb", buffering=0)
        self._deadline = time.monotonic() + (sock.gettimeout() or math.inf)

    def makefile(self, mode: str) -> io.BufferedReader:
        """Itself, as `http.client` asks a socket for it."""
        return io.BufferedReader(self)

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any) -> int | None:
        """As of any raw stream; raises TimeoutError when there is no time left."""
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        self._sock.settimeout(left if left < math.inf else None)
        return self._raw.readinto(buffer)

    def close(self) -> None:
        """Gives the socket back to its connection."""
        self._raw.close()
        super().close()


class _Response(http.client.HTTPResponse):
    """An answer that is read in time, its head as well."""

    def __init__(self, sock: socket.socket, *args: Any, **kwargs: Any) -> None:
        super().__init__(_InTime(sock), *args, **kwargs)  # type: ignore[arg-type]


class _Connection(HTTPConnection):
    """A connection that enters itself in `made`, so that `close` finds it while it is in use."""

    response_class = _Response

    def __init__(self, *, made: WeakKeyDictionary[_Connection, None], **settings: Any) -> None:
        super().__init__(**settings)
        made[self] = None


class HttpTransport(Transport):
    """Blocking HTTP, over connections that are kept and that all threads share.

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
        with _translated(self._server, timeout_s):
            reply = self._exchange("POST", _infer_path(request), timeout_s, request)
            return _answer(request, _checked(reply, self._server, timeout_s))

    def is_ready(self, model: str, timeout_s: float) -> bool:
        """See `Transport.is_ready`."""
        with _translated(self._server, timeout_s):
            return all(
                self._exchange("GET", path, timeout_s).status == 200 for path in _ready_paths(model)
            )

    def width(self, model: str, timeout_s: float) -> int:
        """See `Transport.width`."""
        return self._get(_model_path(model), timeout_s, partial(_width, self._server, model))

    def config(self, model: str, timeout_s: float) -> Config:
        """See `Transport.config`."""
        return self._get(f"{_model_path(model)}/config", timeout_s, _config)

    def close(self) -> None:
        """See `Transport.close`."""
        self._pool.close()
        for reference in self._connections.keyrefs():  # a copy: threads may add meanwhile
            with suppress(OSError, AttributeError):  # just closed, or not yet open
                reference().sock.shutdown(socket.SHUT_RDWR)  # type: ignore[union-attr]

    def _get(self, path: str, timeout_s: float, made: Callable[[Any], T]) -> T:
        """What is made of the JSON at this path."""
        with _translated(self._server, timeout_s):
            reply = self._exchange("GET", path, timeout_s)
            return made(json.loads(_checked(reply, self._server, timeout_s).content))

    def _exchange(
        self, method: str, path: str, timeout_s: float, request: Request | None = None
    ) -> _Reply:
        """One request and its whole answer."""
        body, headers = _body(request, self._binary)
        timeout = Timeout(total=timeout_s)
        response = self._pool.urlopen(
            method, path, body, headers, redirect=False, timeout=timeout, preload_content=False
        )
        content = bytearray()
        with closing(response):  # read to its end, it has given its connection back before
            while chunk := response.read1(1 << 20):
                _add(content, chunk)
        return _Reply(response.status, response.reason, response.headers.get(_HEAD_SIZE), content)


class AsyncHttpTransport(AsyncTransport):
    """HTTP for asyncio. The session is made at the first request, in the loop that sends it.

    Args:
        url: `http://host[:port]`.
        binary: see `HttpTransport`.
    """

    def __init__(self, url: str, *, binary: bool = True) -> None:
        self._server = _endpoint(url)
        self._binary = binary
        self._session: aiohttp.ClientSession | None = None

    async def infer(self, request: Request, timeout_s: float) -> Answer:
        """See `Transport.infer`."""
        reply = await self._exchange("POST", _infer_path(request), timeout_s, request)
        with _translated(self._server, timeout_s):
            return _answer(request, _checked(reply, self._server, timeout_s))

    async def is_ready(self, model: str, timeout_s: float) -> bool:
        """See `Transport.is_ready`."""
        for path in _ready_paths(model):
            if (await self._exchange("GET", path, timeout_s)).status != 200:
                return False
        return True

    async def width(self, model: str, timeout_s: float) -> int:
        """See `Transport.width`."""
        return await self._get(_model_path(model), timeout_s, partial(_width, self._server, model))

    async def config(self, model: str, timeout_s: float) -> Config:
        """See `Transport.config`."""
        return await self._get(f"{_model_path(model)}/config", timeout_s, _config)

    async def close(self) -> None:
        """See `Transport.close`."""
        if self._session is not None:
            await self._session.close()

    async def _get(self, path: str, timeout_s: float, made: Callable[[Any], T]) -> T:
        reply = await self._exchange("GET", path, timeout_s)
        with _translated(self._server, timeout_s):
            return made(json.loads(_checked(reply, self._server, timeout_s).content))

    async def _exchange(
        self, method: str, path: str, timeout_s: float, request: Request | None = None
    ) -> _Reply:
        body, headers = _body(request, self._binary)
        if self._session is None:
            self._session = aiohttp.ClientSession(
                str(self._server),
                connector=aiohttp.TCPConnector(limit=0),
                timeout=aiohttp.ClientTimeout(total=None),
            )
        session = self._session

        async def exchange() -> _Reply:
            with _translated(self._server, timeout_s):
                async with session.request(
                    method, path, data=body, headers=headers, allow_redirects=False
                ) as response:
                    size, content = response.headers.get(_HEAD_SIZE), bytearray()
                    async for chunk in response.content.iter_any():
                        _add(content, chunk)
                    return _Reply(response.status, response.reason, size, content)

        try:
            return await asyncio.wait_for(exchange(), timeout_s)
        except TimedOut:
            raise
        except asyncio.TimeoutError:
            raise timed_out(str(self._server), timeout_s) from None


class _Reply(NamedTuple):
    """An answer: with a `head_size`, its content is so many bytes of JSON, and then tensors."""

    status: int
    reason: str | None
    head_size: str | None
    content: bytes | bytearray


def _add(content: bytearray, chunk: bytes) -> None:
    """Adds to what is read of an answer, while that is no more than any answer has."""
    if len(content) + len(chunk) > MOST_BYTES:
        raise ValueError(f"more than {MOST_BYTES >> 20} MB")
    content += chunk


def _endpoint(url: str) -> Endpoint:
    endpoint = parse_url(url)
    if endpoint.protocol != "http":
        raise InvalidUrl(f"invalid url {url!r} for HTTP: wanted http://host[:port]")
    return endpoint


def _model_path(model: str) -> str:
    return f"/v2/models/{quote(model, safe='')}"


def _ready_paths(model: str) -> tuple[str, str]:
    return "/v2/health/ready", f"{_model_path(model)}/ready"


def _infer_path(request: Request) -> str:
    version = f"/versions/{request.version}" if request.version else ""
    return f"{_model_path(request.model)}{version}/infer"


def _body(request: Request | None, binary: bool) -> tuple[bytes | None, dict[str, str]]:
    """A request's body and headers."""
    if request is None:
        return None, {}
    inputs = request.inputs()
    headers = dict(request.headers)
    if is_request_id(request.id):  # not several, which may be more than a head has room for
        # A gateway looks at no more; Triton at the body alone.
        headers["X-Request-Id"] = request.id
    head = json.dumps(
        {
            **({"id": request.id} if request.id else {}),
            "inputs": [
                {"name": one.name, "datatype": one.kind, "shape": one.shape}
                | (
                    {"parameters": {"binary_data_size": len(one.content)}}
                    if binary
                    else {"data": _listed(one)}
                )
                for one in inputs
            ],
            "outputs": [
                {"name": name, "parameters": {"binary_data": binary}} for name in request.outputs
            ],
        }
    ).encode()
    if not binary:
        return head, headers
    headers[_HEAD_SIZE] = str(len(head))
    return b"".join([head, *(one.content for one in inputs)]), headers


def _listed(tensor: Tensor) -> list[Any]:
    values = read(tensor.kind, [math.prod(tensor.shape)], tensor.content).tolist()
    return [value.decode() for value in values] if tensor.kind == "BYTES" else values


def _answer(request: Request, reply: _Reply) -> Answer:
    """The outputs asked for, over the reply's own bytes where it is binary."""
    content = memoryview(reply.content)
    place = len(content) if reply.head_size is None else int(reply.head_size)
    if not 0 <= place <= len(content):
        raise ValueError(f"a head of {place} bytes in {len(content)}")
    arrays: dict[str, Any] = {}
    for output in json.loads(bytes(content[:place]))["outputs"]:
        kind, shape = output["datatype"], output["shape"]
        if output["name"] in arrays:
            raise ValueError(f"output {output['name']!r} twice")
        size = (output.get("parameters") or {}).get("binary_data_size")
        if size is None:
            array = listed(kind, shape, output["data"])
        elif not 0 <= size <= len(content) - place:
            raise ValueError(f"a tensor of {size} bytes, where {len(content) - place} are left")
        else:
            array = read(kind, shape, content[place : place + size])
            place += size
        arrays[output["name"]] = array
    if place < len(content):
        raise ValueError(f"{len(content) - place} bytes more than its tensors take")
    return {name: arrays[name] for name in request.outputs if name in arrays}


def _checked(reply: _Reply, server: Endpoint, timeout_s: float) -> _Reply:
    """The reply, if it says OK."""
    if reply.status == 200:
        return reply
    try:
        message = str(json.loads(reply.content)["error"])
    except _NOT_AS_TOLD:  # not Triton's words: a proxy's page
        message = reply.reason or ""
    raise from_status(str(reply.status), message, server=str(server), timeout_s=timeout_s)


def _width(server: Endpoint, model: str, metadata: Any) -> int:
    shapes = {output["name"]: output["shape"] for output in metadata["outputs"]}
    return embedding_width(shapes, str(server), model)


def _config(config: Any) -> Config:
    # dict(...): what is none is an error that `_translated` knows
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
        except aiohttp.ClientPayloadError as error:
            if isinstance(error.__cause__, _CUT_OFF):
                raise error.__cause__ from None
            raise
    except ServerError:
        raise
    except pool_errors.ClosedPoolError as error:
        raise ClientClosed("this client was closed during the call") from error
    except pool_errors.LocationParseError as error:
        raise InvalidUrl(f"invalid url {str(server)!r}: {error}") from error
    except (TimeoutError, pool_errors.TimeoutError) as error:
        raise timed_out(str(server), timeout_s) from error
    except _CUT_OFF as error:
        raise unavailable(str(server), error) from error
    except (http.client.HTTPException, aiohttp.ClientError, pool_errors.HTTPError) as error:
        raise unexpected(str(server), error) from error
    except _NOT_AS_TOLD as error:  # a 200 with a body of something else
        raise unexpected(str(server), error) from error
