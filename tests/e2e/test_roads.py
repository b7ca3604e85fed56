# SPDX-License-Identifier: Apache-2.0
"""One table of texts through every road gives the same vectors."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest

from arrowhead_client import AsyncClient, AsyncHttpTransport, Client, HttpTransport
from arrowhead_server.supervisor import Server

Vectors = npt.NDArray[np.float32]


def grpc(server: Server, texts: list[str]) -> Vectors:
    with Client(server.grpc_url) as client:
        return client.embed(texts)


def grpc_one_by_one(server: Server, texts: list[str]) -> Vectors:
    with Client(server.grpc_url, batch_size=1, concurrency=8) as client:
        return client.embed(texts)


def http_binary(server: Server, texts: list[str]) -> Vectors:
    with Client(server.http_url) as client:
        return client.embed(texts)


def http_json(server: Server, texts: list[str]) -> Vectors:
    with Client(transport=HttpTransport(server.http_url, binary=False)) as client:
        return client.embed(texts)


def async_grpc(server: Server, texts: list[str]) -> Vectors:
    async def run() -> Vectors:
        async with AsyncClient(server.grpc_url, batch_size=3) as client:
            return await client.embed(texts)

    return asyncio.run(run())


def async_http(server: Server, texts: list[str]) -> Vectors:
    async def run() -> Vectors:
        async with AsyncClient(server.http_url, batch_size=3) as client:
            return await client.embed(texts)

    return asyncio.run(run())


def async_http_json(server: Server, texts: list[str]) -> Vectors:
    async def run() -> Vectors:
        transport = AsyncHttpTransport(server.http_url, binary=False)
        async with AsyncClient(transport=transport) as client:
            return await client.embed(texts)

    return asyncio.run(run())


def arrow(server: Server, texts: list[str]) -> Vectors:
    with Client(server.grpc_url) as client:
        return _flat(client.embed_arrow(texts))


def arrow_in_grpc(server: Server, texts: list[str]) -> Vectors:
    with Client(server.grpc_url) as client:
        return client.embed(pa.array(texts))


def arrow_in_http(server: Server, texts: list[str]) -> Vectors:
    column = pa.chunked_array([texts[:4], texts[4:]], pa.string())
    with Client(server.http_url, batch_size=3) as client:
        return _flat(client.embed_arrow(column))


def arrow_in_http_json(server: Server, texts: list[str]) -> Vectors:
    with Client(transport=HttpTransport(server.http_url, binary=False)) as client:
        return _flat(client.embed_arrow(pa.array(texts, pa.string_view())))


def async_arrow_in(server: Server, texts: list[str]) -> Vectors:
    async def run() -> Vectors:
        column = pa.array(["before", *texts]).dictionary_encode()[1:]
        grpc, http = AsyncClient(server.grpc_url), AsyncClient(server.http_url, batch_size=3)
        async with grpc, http:
            first = await grpc.embed_arrow(column[:5])
            return _flat(pa.concat_arrays([first, await http.embed_arrow(column[5:])]))

    return asyncio.run(run())


def _flat(array: pa.FixedSizeListArray) -> Vectors:
    assert array.type == pa.list_(pa.float32(), 384)
    return array.flatten().to_numpy().reshape(-1, 384)


def tokenizer_then_encoder(server: Server, texts: list[str]) -> Vectors:
    """The two models behind the ensemble, called by hand."""
    import tritonclient.grpc as triton

    host = server.grpc_url.removeprefix("grpc://")
    with triton.InferenceServerClient(host) as client:
        text = triton.InferInput("text", [len(texts), 1], "BYTES")
        text.set_data_from_numpy(np.array([[t.encode()] for t in texts], object))
        tokens = client.infer("minilm_tokenizer", [text])
        inputs = []
        for name in ("input_ids", "length"):
            value = tokens.as_numpy(name)
            inputs.append(triton.InferInput(name, value.shape, "INT32"))
            inputs[-1].set_data_from_numpy(value)
        vectors: Vectors = client.infer("minilm_encoder", inputs).as_numpy("embeddings")
    return vectors


ROADS: list[Callable[..., Any]] = [
    grpc,
    grpc_one_by_one,
    http_binary,
    http_json,
    async_grpc,
    async_http,
    async_http_json,
    arrow,
    arrow_in_grpc,
    arrow_in_http,
    arrow_in_http_json,
    async_arrow_in,
    tokenizer_then_encoder,
]


@pytest.mark.parametrize("road", ROADS, ids=lambda road: road.__name__)
def test_the_same_vectors(
    server: Server, texts: list[str], wanted: Vectors, road: Callable[[Server, list[str]], Vectors]
) -> None:
    met = road(server, texts)
    assert met.dtype == np.float32
    assert met.shape == wanted.shape
    cosines = (met.astype(np.float64) * wanted).sum(1)
    # A text shares its batch with others on some roads; bfloat16 rounds differently then.
    worst = int(cosines.argmin())
    assert cosines[worst] > 0.9999, (worst, texts[worst], cosines[worst])


def test_they_are_sentence_transformers_vectors(
    client: Client, texts: list[str], minilm_source: Path
) -> None:
    from sentence_transformers import SentenceTransformer

    reference = SentenceTransformer(str(minilm_source), device="cpu").encode(texts, batch_size=1)
    cosines = (client.embed(texts).astype(np.float64) * reference).sum(1)
    assert cosines.min() >= 0.9999
