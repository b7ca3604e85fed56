# SPDX-License-Identifier: Apache-2.0
"""The ways from a text to its vector that `perf.gateway` compares; see `perf.peers.roads`.

Every answer is read to float32 numbers, as a caller needs them: that is part of what JSON costs.
"""

from __future__ import annotations

import base64
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from arrowhead_client import AsyncClient
from perf.peers.roads import GrpcRoad, HttpConnection, checked
from perf.peers.servers import Door
from perf.server import MODEL, Served

PART = 100  # texts in a request to Triton: as many as the gateway puts into one


class ClientRoad:
    """Straight to Triton, as Python callers go: `AsyncClient` over gRPC."""

    def __init__(self, url: str) -> None:
        self._client = AsyncClient(url, model=MODEL, batch_size=PART)

    async def embed(self, texts: Sequence[str]) -> bytes:
        vectors = await self._client.embed(texts, progress=False)
        return checked(vectors.tobytes(), texts)

    async def close(self) -> None:
        await self._client.close()


class TeiRoad(HttpConnection):
    """`/embed`: lists of numbers."""

    async def embed(self, texts: Sequence[str]) -> bytes:
        _, answer = await self.post("/embed", orjson.dumps({"inputs": texts}))
        return checked(np.array(orjson.loads(answer), np.float32).tobytes(), texts)


class OpenaiRoad(HttpConnection):
    """`/v1/embeddings` in base64, which OpenAI's own client asks for."""

    async def embed(self, texts: Sequence[str]) -> bytes:
        order = {"model": MODEL, "input": texts, "encoding_format": "base64"}
        _, answer = await self.post("/v1/embeddings", orjson.dumps(order))
        rows: list[dict[str, Any]] = orjson.loads(answer)["data"]
        return checked(b"".join(base64.b64decode(row["embedding"]) for row in rows), texts)


def direct(server: Served) -> list[Door]:
    """Past any gateway. The others are compared with the first."""
    url, port = grpc_url(server), server.address.grpc_port
    return [
        Door("grpc", "gRPC, `AsyncClient`", lambda: ClientRoad(url), shared=True),
        Door("stub", "gRPC, bare stub", lambda: GrpcRoad(port), shared=True),
    ]


def naive(port: int) -> Door:
    """Into the application that only passes texts on."""
    return Door("naive", "naive FastAPI, `/embed`", lambda: TeiRoad(port))


def gateway(port: int) -> list[Door]:
    """Into ours."""
    return [
        Door("tei", "gateway, `/embed`", lambda: TeiRoad(port)),
        Door("openai", "gateway, `/v1/embeddings`", lambda: OpenaiRoad(port)),
    ]


def gateway_command(server: Served, port: int) -> list[str]:
    """Starts ours, with its own defaults."""
    program = str(Path(sys.executable).with_name("arrowhead"))
    return [program, "gateway", f"--url={grpc_url(server)}", f"--port={port}"]


def naive_command(server: Served, port: int) -> list[str]:
    """Starts the naive one."""
    return [sys.executable, "-m", "perf.gateway_naive", grpc_url(server), str(port)]


def grpc_url(server: Served) -> str:
    """Where Triton listens."""
    return f"grpc://{server.address.host}:{server.address.grpc_port}"
