# SPDX-License-Identifier: Apache-2.0
"""Bad callers: those who go away in the middle, who are slow on purpose, who send what kills."""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

import grpc
import httpx
import orjson
from tritonclient.grpc.service_pb2 import ModelInferRequest
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

from deploy.stack import Stack
from perf.faults_load import GatewayRoad, Known, TritonRoad
from perf.server import MODEL

_PAUSE_S = 0.03
_DRIP_S = 0.5  # between two bytes
_RESET = struct.pack("ii", 1, 0)  # linger for no time: the connection ends at once, unread
_H2_BEGIN = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\x04\0\0\0\0\0"  # and empty settings
_MANY = 2**62  # of int32: 2**64 bytes, which Triton 2.51 counts as none
_ANSWER_S = 20.0


def poison() -> ModelInferRequest:
    """Ids without content, of a shape whose bytes overflow; see SECURITY.md."""
    request = ModelInferRequest(model_name=f"{MODEL}_encoder")
    for name, size, content in (("input_ids", _MANY, b""), ("length", 1, b"\1\0\0\0")):
        request.inputs.add(name=name, datatype="INT32", shape=[1, size])
        request.raw_input_contents.append(content)
    return request


def poisoned_over_grpc(stack: Stack) -> str:
    """Sends it through HAProxy; the answer's status."""
    with grpc.insecure_channel(stack.grpc_url.removeprefix("grpc://")) as channel:
        try:
            GRPCInferenceServiceStub(channel).ModelInfer(poison(), timeout=_ANSWER_S)
        except grpc.RpcError as error:
            return str(error.code().name)
    return "OK"


def poisoned_over_http(stack: Stack) -> str:
    """The same over HTTP."""
    request = poison()
    inputs = [
        {
            "name": tensor.name,
            "datatype": tensor.datatype,
            "shape": list(tensor.shape),
            "parameters": {"binary_data_size": len(content)},
        }
        for tensor, content in zip(request.inputs, request.raw_input_contents, strict=True)
    ]
    head = orjson.dumps({"inputs": inputs})
    answer = httpx.post(
        f"{stack.http_url}/v2/models/{request.model_name}/infer",
        headers={"Inference-Header-Content-Length": str(len(head))},
        content=head + b"".join(request.raw_input_contents),
        timeout=_ANSWER_S,
    )
    return str(answer.status_code)


def leave(stack: Stack, known: Known, count: int) -> Counter[str]:
    """So many callers a way go away: in the head, in the body, and while they are answered.

    Returns:
        How many went away when.
    """
    return asyncio.run(_leave(stack, known, count))


async def _leave(stack: Stack, known: Known, count: int) -> Counter[str]:
    left: Counter[str] = Counter()
    long_text = " ".join(known.texts)
    for url, path in (
        (stack.gateway_url, "/embed"),
        (stack.http_url, f"/v2/models/{MODEL}/infer"),
    ):
        head, body = _request(url, path, long_text)
        for when, part in (
            ("in the head", head[: len(head) // 2]),
            ("in the body", head + body[: len(body) // 2]),
            ("before the answer", head + body),
        ):
            for _ in range(count):
                with suppress(OSError):
                    await _hang_up(url, part)
                    left[when] += 1
    roads = (
        GatewayRoad(stack.gateway_url),
        TritonRoad(stack.http_url),
        TritonRoad(stack.grpc_url),
    )
    for road in roads:
        for number in range(count):
            texts = [f"{text} {number}" for text in known.texts[:4]]  # new ones, each time
            try:
                await asyncio.wait_for(road.embed(texts), random.uniform(0.001, 0.03))  # noqa: S311
            except asyncio.TimeoutError:
                left["cancelled"] += 1
            # Triton computes for those who are gone, too: more would be an overload.
            await asyncio.sleep(_PAUSE_S)
        await road.close()
    return left


async def _hang_up(url: str, part: bytes) -> None:
    _, writer = await _connect(url)
    writer.write(part)
    await asyncio.sleep(random.uniform(0, _PAUSE_S))  # noqa: S311
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    await _closed(writer)


def dawdle(stack: Stack, known: Known, count: int, seconds: float) -> dict[str, tuple[int, float]]:
    """So many slow callers of each kind at once, for so long.

    Returns:
        By kind: how many were hung up on, and after how many seconds the last of them.
    """
    return asyncio.run(_dawdle(stack, known, count, seconds))


async def _dawdle(
    stack: Stack, known: Known, count: int, seconds: float
) -> dict[str, tuple[int, float]]:
    gateway = f"http://{stack.address('gateway1')}:8080"
    texts = [known.texts[number % len(known.texts)] for number in range(400)]
    kinds: dict[str, Callable[[], Coroutine[Any, Any, None]]] = {}
    for name, url, path in (
        ("HAProxy", stack.gateway_url, "/embed"),
        ("HAProxy for Triton", stack.http_url, f"/v2/models/{MODEL}/infer"),
        ("gateway", gateway, "/embed"),
    ):
        head, body = _request(url, path, known.texts[0] * 20)
        kinds[f"heads to {name}"] = _sender(url, b"", head)
        kinds[f"bodies to {name}"] = _sender(url, head, body)
        if path == "/embed":
            kinds[f"unread answers of {name}"] = _unreading(url, path, texts)
    kinds["HTTP/2 to HAProxy"] = _sender(stack.grpc_url, b"", _H2_BEGIN * 10)
    found = {}
    for kind, (ended, _) in zip(
        kinds,
        await asyncio.gather(*(_some(make, count, seconds) for make in kinds.values())),
        strict=True,
    ):
        found[kind] = len(ended), max(ended, default=0.0)
    return found


async def _some(
    make: Callable[[], Awaitable[None]], count: int, seconds: float
) -> tuple[list[float], int]:
    """After how many seconds callers were hung up on, and how many were not."""
    began, ended = time.monotonic(), []

    async def one() -> None:
        with suppress(OSError, asyncio.IncompleteReadError):
            await make()
        ended.append(time.monotonic() - began)

    tasks = [asyncio.ensure_future(one()) for _ in range(count)]
    _, still = await asyncio.wait(tasks, timeout=seconds)
    for task in still:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return ended, len(still)


def _sender(url: str, at_once: bytes, slowly: bytes) -> Callable[[], Coroutine[Any, Any, None]]:
    """Sends some of it at once and the rest byte by byte, until it is hung up on."""

    async def send() -> None:
        reader, writer = await _connect(url)
        try:
            writer.write(at_once)
            over = asyncio.ensure_future(_read_to_end(reader))
            for byte in slowly:
                writer.write(bytes([byte]))
                await writer.drain()
                done, _ = await asyncio.wait([over], timeout=_DRIP_S)
                if done:
                    return
            await over
        finally:
            await _closed(writer)

    return send


def _unreading(url: str, path: str, texts: list[str]) -> Callable[[], Coroutine[Any, Any, None]]:
    """Asks for much and reads none of it, until it is hung up on."""

    async def ask() -> None:
        head, body = _request(url, path, texts)
        with socket.socket() as connection:
            connection.setblocking(False)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            place = urlsplit(url)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(connection, (place.hostname, place.port))
            await loop.sock_sendall(connection, head + body)
            while True:
                await asyncio.sleep(_DRIP_S)
                # A reset shows here; what was read before it would hide it.
                if connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                    return

    return ask


async def _closed(writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()
    with suppress(OSError):
        await writer.wait_closed()


async def _read_to_end(reader: asyncio.StreamReader) -> None:
    with suppress(OSError):
        while await reader.read(65536):
            pass


async def _connect(url: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    place = urlsplit(url)
    return await asyncio.open_connection(place.hostname, place.port)


def _request(url: str, path: str, inputs: str | list[str]) -> tuple[bytes, bytes]:
    """Head and body of a request."""
    if path.startswith("/v2/"):
        tensor = {"name": "text", "shape": [1, 1], "datatype": "BYTES", "data": [inputs]}
        body = orjson.dumps({"inputs": [tensor]})
    else:
        body = orjson.dumps({"inputs": inputs, "truncate": True})
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {urlsplit(url).hostname}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode(), body
