# SPDX-License-Identifier: Apache-2.0
"""A server that means harm, or is broken: a clear error in time, and never another vector."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import psutil
import pytest

from arrowhead_client import (
    AsyncClient,
    Client,
    FakeTransport,
    InvalidRequest,
    Request,
    ServerError,
    TimedOut,
    UnexpectedResponse,
)
from perf.fuzz.lines import HostileServer, Piece, Script


@pytest.fixture
def server() -> Iterator[HostileServer]:
    server = HostileServer()
    yield server
    server.stop()


@pytest.fixture(params=["blocking", "async"])
def manner(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def embed(server: HostileServer, manner: str, timeout_s: float = 20.0) -> Any:
    url = f"http://127.0.0.1:{server.port}"
    if manner == "blocking":
        with Client(url, timeout_s=timeout_s, retries=0) as client:
            return client.embed("a")

    async def asked() -> Any:
        async with AsyncClient(url, timeout_s=timeout_s, retries=0) as client:
            return await client.embed("a")

    return asyncio.run(asked())


def answering(*raw: bytes, pause_s: float = 0.0, endless: bool = False) -> Script:
    pieces = tuple(Piece(one, pause_s) for one in raw)
    return Script("http", pieces, endless, "hold" if endless else "close")


def whole(body: bytes, status: bytes = b"200 OK", headers: bytes = b"") -> Script:
    size = b"Content-Length: %d\r\n" % len(body)
    return answering(b"HTTP/1.1 %b\r\n%b%b\r\n%b" % (status, size, headers, body))


def output(**changes: Any) -> bytes:
    sound = {"name": "embeddings", "datatype": "FP32", "shape": [1, 2], "data": [0.6, 0.8]}
    return json.dumps({"outputs": [{**sound, **changes}]}).encode()


def test_a_sound_answer_is_one(server: HostileServer, manner: str) -> None:
    server.play(whole(output()))
    np.testing.assert_array_equal(embed(server, manner), np.array([0.6, 0.8], np.float32))


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000,
        b'{"outputs": ' + b"[" * 100_000,
        output(shape=[-1, 2]),
        output(shape=[True, 2]),
        output(shape=[1.0, 2]),
        output(data=[0.6, float("nan")]),
        output(data=[0.6, float("inf")]),
        output(datatype="INT32", data=[1, 2]),
        output(datatype="INT32", data=[1, 2**32 + 2]),
        output(datatype="INT8", data=[1, 0.5]),
        output(datatype="INT8", data=[1, float("nan")]),
        output(data=[0.6, 1e308]),
        output(datatype="BOOL", data=[True, False]),
        output(datatype="BYTES", data=["1", "x"]),
        output(datatype="x"),
        output(data=[[0.6], [0.8, 1.0]]),
        output(data=None),
        output(parameters={"binary_data_size": 8}),
        output(parameters={"binary_data_size": -8}),
        output(parameters=7),
        output()[:-2] + b", " + output()[13:],
        output() + b"\0",
    ],
    ids=lambda body: body[:90].decode(),
)
def test_an_answer_that_does_not_fit_itself(
    server: HostileServer, manner: str, body: bytes
) -> None:
    server.play(whole(body))
    with pytest.raises(UnexpectedResponse) as caught:
        embed(server, manner)
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize("size", [b"-99", b"0", b"7", b"100000", b"x", b"9" * 5000])
def test_a_head_of_another_size(server: HostileServer, manner: str, size: bytes) -> None:
    vector = np.array([0.6, 0.8], "<f4").tobytes()
    head = json.loads(output(parameters={"binary_data_size": 8}))
    body = json.dumps(head).encode() + vector
    server.play(whole(body, headers=b"Inference-Header-Content-Length: %b\r\n" % size))
    with pytest.raises(UnexpectedResponse):
        embed(server, manner)


@pytest.mark.parametrize(
    "script",
    [
        answering(b"HTTP/1.1 100 Continue\r\n\r\n", pause_s=0.02, endless=True),
        answering(b"HTTP/1.1 100 Continue\r\n\r\n", endless=True),
        answering(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n", pause_s=0.1, endless=True),
        answering(
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1",
            b"0",
            pause_s=0.1,
            endless=True,
        ),
        answering(
            b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n", b"x", pause_s=0.1, endless=True
        ),
    ],
    ids=["continue", "continue at once", "head", "chunk", "body"],
)
def test_the_time_is_that_of_the_whole_answer(
    server: HostileServer, manner: str, script: Script
) -> None:
    """Each read met something, so that none of them timed out."""
    server.play(script)
    began = time.monotonic()
    with pytest.raises(ServerError) as caught:  # of heads without an end some are refused sooner
        embed(server, manner, timeout_s=0.5)
    assert isinstance(caught.value, (TimedOut, UnexpectedResponse))
    assert time.monotonic() - began < 2.5


def test_an_answer_without_an_end_does_not_fill_memory(
    server: HostileServer, manner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("arrowhead_client._http.MOST_BYTES", 4 << 20)
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    server.play(answering(head, b"100000\r\n%b\r\n" % (b"x" * 0x100000), endless=True))
    with pytest.raises(UnexpectedResponse, match="more than 4 MB"):
        embed(server, manner)


def test_what_a_server_says_is_one_line_that_no_terminal_obeys(
    server: HostileServer, manner: str
) -> None:
    said = json.dumps({"error": "\x1b[2J red\nand \x07 more " + "a" * 100_000}).encode()
    server.play(whole(said, b"400 Bad Request"))
    with pytest.raises(InvalidRequest) as caught:
        embed(server, manner)
    told = str(caught.value)
    assert told.isprintable()
    assert "[2J red and" in told
    assert len(told) == 2000


TOKENS = {
    "input_ids": np.array([[101, 7, 102]], np.int32),
    "length": np.array([[3]], np.int32),
    "truncated": np.array([[False]]),
    "tokens": np.array([[b"[CLS]", b"a", b"[SEP]"]], object),
    "offsets": np.array([[[-1, -1], [0, 1], [-1, -1]]], np.int32),
}


@pytest.mark.parametrize(
    "changes",
    [
        {"length": np.array([[4]], np.int32)},
        {"length": np.array([[-1]], np.int32)},
        {"length": np.array([3], np.int32)},
        {"length": np.array([], np.int32)},
        {"tokens": np.array([[b"\xa4", b"a", b"\xa4"]], object)},
        {"tokens": np.array([[7, 7, 7]], np.int32)},
        {"offsets": np.array([[[-1, -1], [0, 2], [-1, -1]]], np.int32)},
        {"offsets": np.array([[[-1, -1], [1, 0], [-1, -1]]], np.int32)},
        {"offsets": np.array([[0, 1, 2]], np.int32)},
        {"input_ids": np.array([[b"x"]], object)},
    ],
    ids=str,
)
def test_tokens_that_do_not_fit_the_text(changes: dict[str, Any]) -> None:
    transport = FakeTransport(answer=lambda request: {**TOKENS, **changes})
    with Client(transport=transport) as client, pytest.raises(UnexpectedResponse):
        client.tokenize("a")


@pytest.mark.parametrize(
    "changes",
    [
        {"length": np.array([[-1]], np.int32)},
        {"length": np.array([[3, 3]], np.int32)},
        {"length": np.array([[3.0]])},
        {"truncated": np.array([[1]], np.int32)},
        {"truncated": np.array([[False, True]])},
    ],
    ids=str,
)
def test_counts_that_count_nothing(changes: dict[str, Any]) -> None:
    transport = FakeTransport(answer=lambda request: {**TOKENS, **changes})
    with Client(transport=transport) as client, pytest.raises(UnexpectedResponse):
        client.count_tokens("a")


@pytest.mark.parametrize(
    "changes",
    [
        {"dimension": "8"},
        {"dimension": 0},
        {"dimension": True},
        {"dimension": 16},  # the ranges have 8
        {"max_seq_length": None},
        {"fingerprint": 7},
        {"normalize": "yes"},
        {"certificate": []},
        {"source": None},
        {"ranges": "AAAA"},
        {"unknown": 1},
    ],
    ids=str,
)
def test_a_model_that_tells_something_else(changes: dict[str, Any]) -> None:
    def answer(request: Request) -> Any:
        told = {**json.loads(FakeTransport()._info()), **changes}
        return {"info": np.array([[json.dumps(told).encode()]], object)}

    transport = FakeTransport(answer=answer)
    told = pytest.raises(UnexpectedResponse, match="told something else")
    with Client(transport=transport) as client, told:
        client.info()


def test_hostile_answers_leave_no_connection_behind(server: HostileServer, until: Any) -> None:
    server.play(answering(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"))
    before = psutil.Process().num_fds()
    with Client(f"http://127.0.0.1:{server.port}", retries=2) as client:
        for _ in range(50):
            with pytest.raises(UnexpectedResponse):
                client.embed("a")
    until(lambda: psutil.Process().num_fds() <= before + 1)
