# SPDX-License-Identifier: Apache-2.0
"""How a server is asked for vectors: one small class a protocol, nothing between it and the socket.

Every answer is read in full and comes back as the vectors' bytes (float32, row by row), checked for
their number. An HTTP road belongs to one client at a time, a gRPC road may be shared.
"""

from __future__ import annotations

import asyncio
import base64
import json
import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Protocol

import grpc.aio
import numpy as np
from tritonclient.grpc import service_pb2, service_pb2_grpc

from perf.stats import Vectors

WIDTH = 384  # of the model's vectors
_FLOAT = 4
_HOST = "127.0.0.1"
_BUFFER = 1 << 20
_MODEL = "minilm"


class WrongAnswer(Exception):
    """The server answered, but not with as many vectors as there were texts."""


class Road(Protocol):
    """One client's way to a server."""

    async def embed(self, texts: Sequence[str]) -> bytes:
        """The texts' vectors.

        Raises:
            WrongAnswer: an error, or vectors of another size.
            OSError: no connection.
        """
        ...

    async def close(self) -> None: ...


def to_vectors(answer: bytes) -> Vectors:
    """What a road brought, as an array [N, D]."""
    return np.frombuffer(answer, np.float32).reshape(-1, WIDTH)


def checked(answer: bytes, texts: Sequence[str]) -> bytes:
    """The answer itself, if it is as long as it must be."""
    if len(answer) != len(texts) * WIDTH * _FLOAT:
        raise WrongAnswer(f"{len(answer)} bytes for {len(texts)} texts: {answer[:200]!r}")
    return answer


class HttpConnection:
    """One connection, kept open; just as much HTTP/1.1 as these servers speak."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def post(self, path: str, body: bytes, headers: str = "") -> tuple[bytes, bytes]:
        """The head and the body of the answer.

        Raises:
            WrongAnswer: the status is not 200.
        """
        if self._streams is None:
            self._streams = await asyncio.open_connection(_HOST, self._port, limit=_BUFFER)
        reader, writer = self._streams
        writer.write(
            f"POST {path} HTTP/1.1\r\nHost: {_HOST}\r\nContent-Type: application/json\r\n"
            f"{headers}Content-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            answer = await reader.readexactly(header(head, b"content-length"))
        except asyncio.IncompleteReadError as error:
            raise ConnectionResetError("the server closed the connection") from error
        if head.split(b" ", 2)[1] != b"200":
            raise WrongAnswer(f"{head.splitlines()[0].decode()}: {answer[:200]!r}")
        return head, answer

    async def close(self) -> None:
        """Closes it; it may be used again."""
        if self._streams is not None:
            writer = self._streams[1]
            self._streams = None
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()


def header(head: bytes, name: bytes) -> int:
    """A number in an answer's head, which is in lower case."""
    found = re.search(rb"\r\n%b: *(\d+)" % re.escape(name), head)
    if found is None:
        raise WrongAnswer(f"no {name.decode()} in {head!r}")
    return int(found[1])


class FastApiRoad(HttpConnection):
    """To `app`: JSON there, the vectors' bytes back."""

    async def embed(self, texts: Sequence[str]) -> bytes:
        body = json.dumps({"texts": texts}, ensure_ascii=False).encode()
        return checked((await self.post("/embed", body))[1], texts)


class InfinityRoad(HttpConnection):
    """To infinity's own API; base64 is the shortest form it answers in."""

    async def embed(self, texts: Sequence[str]) -> bytes:
        order = {"model": _MODEL, "input": texts, "encoding_format": "base64"}
        body = json.dumps(order, ensure_ascii=False).encode()
        rows = json.loads((await self.post("/embeddings", body))[1])["data"]
        return checked(b"".join(base64.b64decode(row["embedding"]) for row in rows), texts)


class TritonHttpRoad(HttpConnection):
    """To Triton's HTTP with its binary extension both ways."""

    async def embed(self, texts: Sequence[str]) -> bytes:
        content = packed(texts)
        head = json.dumps(
            {
                "inputs": [
                    {
                        "name": "text",
                        "shape": [len(texts), 1],
                        "datatype": "BYTES",
                        "parameters": {"binary_data_size": len(content)},
                    }
                ],
                "outputs": [{"name": "embeddings", "parameters": {"binary_data": True}}],
            }
        ).encode()
        length = "Inference-Header-Content-Length"
        got, answer = await self.post(
            f"/v2/models/{_MODEL}/infer", head + content, f"{length}: {len(head)}\r\n"
        )
        return checked(answer[header(got, length.lower().encode()) :], texts)


class GrpcRoad:
    """To Triton's gRPC, by its own stubs, over one connection."""

    def __init__(self, port: int) -> None:
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1)]
        self._channel = grpc.aio.insecure_channel(f"{_HOST}:{port}", options=options)
        self._stub: Any = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    async def embed(self, texts: Sequence[str]) -> bytes:
        request = service_pb2.ModelInferRequest(
            model_name=_MODEL,
            inputs=[
                service_pb2.ModelInferRequest.InferInputTensor(
                    name="text", datatype="BYTES", shape=[len(texts), 1]
                )
            ],
            raw_input_contents=[packed(texts)],
        )
        try:
            response = await self._stub.ModelInfer(request)
        except grpc.aio.AioRpcError as error:
            raise WrongAnswer(f"{error.code()}: {error.details()}") from error
        return checked(response.raw_output_contents[0], texts)

    async def close(self) -> None:
        await self._channel.close()


def packed(texts: Sequence[str]) -> bytes:
    """Texts as Triton takes them: each with its length before it, 4 bytes little-endian."""
    encoded = [text.encode() for text in texts]
    return b"".join(len(one).to_bytes(4, "little") + one for one in encoded)
