# SPDX-License-Identifier: Apache-2.0
"""A bad request gets its own error with the right status and costs its neighbours nothing."""

from __future__ import annotations

import asyncio
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tritonclient.grpc as grpc
import tritonclient.grpc.aio as grpc_aio
import tritonclient.http as http
from tritonclient.utils import InferenceServerException

from arrowhead_client import Client, Experiment, InvalidRequest, ModelNotFound
from arrowhead_server.supervisor import Server


def text_input(kind: Any, values: list[bytes]) -> Any:
    tensor = kind.InferInput("text", [len(values), 1], "BYTES")
    tensor.set_data_from_numpy(np.array([[value] for value in values], object))
    return tensor


def ids_inputs(kind: Any, rows: list[list[int]], lengths: list[int]) -> list[Any]:
    inputs = []
    for name, value in (("input_ids", rows), ("length", [[n] for n in lengths])):
        array = np.array(value, np.int32).reshape(len(rows), -1)
        inputs.append(kind.InferInput(name, array.shape, "INT32"))
        inputs[-1].set_data_from_numpy(array)
    return inputs


@pytest.fixture(params=["grpc", "http"])
def wire(request: pytest.FixtureRequest, server: Server) -> Iterator[tuple[Any, Any, str]]:
    """A raw client, its module, and how it spells an invalid argument."""
    kind = grpc if request.param == "grpc" else http
    url = server.grpc_url if request.param == "grpc" else server.http_url
    client = kind.InferenceServerClient(url.split("://")[1])
    yield client, kind, "StatusCode.INVALID_ARGUMENT" if request.param == "grpc" else "400"
    client.close()


def refused(wire: tuple[Any, Any, str], model: str, inputs: list[Any]) -> str:
    client, _, status = wire
    with pytest.raises(InferenceServerException) as caught:
        client.infer(model, inputs)
    assert caught.value.status() == status, caught.value
    message: str = caught.value.message()
    assert "Traceback" not in message
    assert ".py" not in message
    return message


@pytest.mark.parametrize("model", ["minilm", "minilm_tokenizer"])
def test_text_that_is_not_utf8(wire: tuple[Any, Any, str], model: str) -> None:
    message = refused(wire, model, [text_input(wire[1], [b"fine", b"ab\xff"])])
    assert "text 1 is not UTF-8: byte 2 of 3 is 0xff" in message


@pytest.mark.parametrize("model", ["minilm", "minilm_tokenizer"])
def test_more_texts_than_a_request_may_hold(wire: tuple[Any, Any, str], model: str) -> None:
    assert "100" in refused(wire, model, [text_input(wire[1], [b"x"] * 101)])


@pytest.mark.parametrize(
    ("rows", "lengths", "message"),
    [
        ([[101, 99999, 102]], [3], "row 0: ids from 101 to 99999; wanted 0 to 30521"),
        ([[101, -1, 102]], [3], "row 0: ids from -1"),
        ([[101, 102]], [0], "row 0: length 0; wanted 1 to 2"),
        ([[101, 102]], [3], "row 0: length 3; wanted 1 to 2"),
        ([[101, 102], [101, 102]], [2, -7], "row 1: length -7"),
        ([[1] * 300], [300], "length 300; wanted 1 to 256"),
    ],
)
def test_ids_that_cannot_be_embedded(
    wire: tuple[Any, Any, str], rows: list[list[int]], lengths: list[int], message: str
) -> None:
    assert message in refused(wire, "minilm_encoder", ids_inputs(wire[1], rows, lengths))


def test_a_request_without_its_text(wire: tuple[Any, Any, str]) -> None:
    refused(wire, "minilm", ids_inputs(wire[1], [[101, 102]], [2]))


def test_neighbours_in_the_batch_succeed(server: Server, client: Client) -> None:
    """Good and bad requests sent at once, so that they share batches."""
    good = [f"a good request, number {i} of its kind, {'and long ' * (i % 7)}" for i in range(60)]
    bad = [b"bad \xff" + bytes([65 + i % 26]) for i in range(60)]

    async def send() -> list[Any]:
        async with grpc_aio.InferenceServerClient(server.grpc_url.split("://")[1]) as raw:
            calls = []
            for text, spoiled in zip(good, bad, strict=True):
                calls.append(raw.infer("minilm", [text_input(grpc, [text.encode()])]))
                calls.append(raw.infer("minilm", [text_input(grpc, [spoiled])]))
                bad_ids = ids_inputs(grpc, [[101, 40_000, 102]], [3])
                calls.append(raw.infer("minilm_encoder", bad_ids))
            return await asyncio.gather(*calls, return_exceptions=True)

    before = executions(server, "minilm_tokenizer")
    answers = asyncio.run(send())
    after = executions(server, "minilm_tokenizer")
    for answer in answers[1::3] + answers[2::3]:
        assert isinstance(answer, InferenceServerException)
        assert answer.status() == "StatusCode.INVALID_ARGUMENT"
    met = np.concatenate([answer.as_numpy("embeddings") for answer in answers[::3]])
    assert cosines(met, client.embed(good)).min() > 0.9999
    # They really met: fewer batches ran than requests were answered.
    assert after - before < len(good) + len(bad)


def executions(server: Server, model: str) -> int:
    """Batches that a model ran so far."""
    url = f"{server.http_url}/v2/models/{model}/stats"
    with urllib.request.urlopen(url, timeout=10) as answer:  # noqa: S310
        return int(json.load(answer)["model_stats"][0]["execution_count"])


def cosines(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    return (a.astype(np.float64) * b).sum(1)


def test_malformed_http_bodies_are_the_callers_fault(server: Server) -> None:
    for body in (b'{"inputs": []}', b'{"inputs": [{"name": "text"}]}'):
        request = urllib.request.Request(f"{server.http_url}/v2/models/minilm/infer", body)  # noqa: S310
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(request, timeout=10)  # noqa: S310
        assert caught.value.code == 400
        caught.value.close()


def test_the_client_names_the_fault(server: Server) -> None:
    for url in (server.grpc_url, server.http_url):
        with (
            Client(url, model="nonesuch") as client,
            pytest.raises(ModelNotFound, match="nonesuch"),
        ):
            client.embed("hello")
        with (
            Client(url, experiment=Experiment(share=1, key="a")) as client,
            pytest.raises(ModelNotFound, match=r"candidate's arm .* 'minilm_candidate' is not"),
        ):
            client.embed("hello")
    with pytest.raises(InvalidRequest):
        _embed_raw(server, b"\xff")


def _embed_raw(server: Server, text: bytes) -> None:
    from arrowhead_client import GrpcTransport, Request

    transport = GrpcTransport(server.grpc_url)
    try:
        transport.infer(Request("minilm", [text], ("embeddings",)), 10.0)
    finally:
        transport.close()
