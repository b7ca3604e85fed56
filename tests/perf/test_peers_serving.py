# SPDX-License-Identifier: Apache-2.0
"""The queue before a peer's engine, the padding in it, and the clients that load a server."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

import numpy as np
import pytest

from perf.peers.batching import Batcher, Vectors
from perf.peers.generator import closed_loop, loads, summary
from perf.peers.padding import groups
from perf.peers.roads import (
    WIDTH,
    FastApiRoad,
    InfinityRoad,
    TritonHttpRoad,
    WrongAnswer,
    packed,
    to_vectors,
)


class FakeEngine:
    """Vectors that say which text they are of; the first call waits until it is let go."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.go = threading.Event()

    def encode(self, texts: list[str]) -> Vectors:
        self.calls.append(texts)
        assert self.go.wait(10)
        if "bad" in texts:
            raise ValueError("a bad text")
        return np.array([[float(text), 0.0] for text in texts], np.float32)


async def gathered(batcher: Batcher, engine: FakeEngine, requests: list[list[str]]) -> list[object]:
    """The answers of requests of which all but the first come while the engine works."""
    first = asyncio.ensure_future(batcher.embed(requests[0]))
    while not engine.calls:
        await asyncio.sleep(0.001)
    rest = [asyncio.ensure_future(batcher.embed(request)) for request in requests[1:]]
    await asyncio.sleep(0)
    engine.go.set()
    return list(await asyncio.gather(first, *rest, return_exceptions=True))


async def test_what_waits_goes_in_together_up_to_the_limit():
    engine = FakeEngine()
    batcher = Batcher(engine.encode, most=4)
    answers = await gathered(batcher, engine, [["1"], ["2", "3"], ["4"], ["5", "6"], ["7"]])
    assert engine.calls == [["1"], ["2", "3", "4"], ["5", "6", "7"]]
    assert [answer[:, 0].tolist() for answer in answers] == [[1], [2, 3], [4], [5, 6], [7]]


async def test_a_request_beyond_the_limit_goes_alone():
    engine = FakeEngine()
    await gathered(Batcher(engine.encode, most=2), engine, [["1"], ["2", "3", "4"], ["5"]])
    assert engine.calls == [["1"], ["2", "3", "4"], ["5"]]


async def test_an_error_is_for_its_batch_alone_and_the_queue_goes_on():
    engine = FakeEngine()
    batcher = Batcher(engine.encode, most=1)
    answers = await gathered(batcher, engine, [["1"], ["bad"], ["3"]])
    assert isinstance(answers[1], ValueError)
    assert [answers[i][0, 0] for i in (0, 2)] == [1, 3]
    assert (await batcher.embed(["4"]))[0, 0] == 4


@pytest.mark.parametrize("lengths", [[], [5], [3, 200, 4, 190, 3], list(range(1, 65))])
def test_groups_hold_every_text_once_and_little_padding(lengths: list[int]):
    made = groups(lengths, most_padding=0.25)
    assert sorted(i for group in made for i in group) == list(range(len(lengths)))
    for group in made:
        computed = len(group) * max(lengths[i] for i in group)
        assert computed - sum(lengths[i] for i in group) <= 0.25 * computed


def test_texts_of_one_length_are_one_group():
    assert len(groups([16] * 32)) == 1


Answer = Callable[[str, bytes], Awaitable[tuple[int, str, bytes]]]


@asynccontextmanager
async def serving(answer: Answer) -> AsyncIterator[int]:
    """A real HTTP server on loopback; `answer` makes status, headers and body of path and body."""
    connections: set[asyncio.Task[None]] = set()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        connections.add(task)
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                length = int(head.lower().split("\r\ncontent-length:")[1].split("\r\n")[0])
                path = head.split(" ")[1]
                status, headers, body = await answer(path, await reader.readexactly(length))
                top = f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\n{headers}\r\n"
                # In two parts: an answer need not come at once.
                writer.write(top.encode() + body[:100])
                await writer.drain()
                writer.write(body[100:])
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]
        await asyncio.gather(*connections)


def vectors_of(texts: list[str]) -> bytes:
    return np.array([[len(text)] * WIDTH for text in texts], np.float32).tobytes()


async def as_fastapi(path: str, body: bytes) -> tuple[int, str, bytes]:
    assert path == "/embed"
    return 200, "", vectors_of(json.loads(body)["texts"])


async def test_our_own_protocol():
    async with serving(as_fastapi) as port:
        road = FastApiRoad(port)
        for texts in (["a", "zwölf"], ["bc"]):  # over one connection
            assert to_vectors(await road.embed(texts))[:, 0].tolist() == [len(t) for t in texts]
        await road.close()


async def test_infinitys_protocol():
    import base64

    async def answer(path: str, body: bytes) -> tuple[int, str, bytes]:
        order = json.loads(body)
        assert (path, order["encoding_format"]) == ("/embeddings", "base64")
        rows = [{"embedding": base64.b64encode(vectors_of([t])).decode()} for t in order["input"]]
        return 200, "", json.dumps({"data": rows}).encode()

    async with serving(answer) as port:
        road = InfinityRoad(port)
        assert to_vectors(await road.embed(["a", "bc"]))[:, 0].tolist() == [1, 2]
        await road.close()


async def test_tritons_protocol():
    async def answer(path: str, body: bytes) -> tuple[int, str, bytes]:
        assert path == "/v2/models/minilm/infer"
        head, content = body[: body.rindex(b"}") + 1], body[body.rindex(b"}") + 1 :]
        assert json.loads(head)["inputs"][0]["parameters"]["binary_data_size"] == len(content)
        assert content == packed(["a", "bc"])
        return 200, "Inference-Header-Content-Length: 2\r\n", b"{}" + vectors_of(["a", "bc"])

    async with serving(answer) as port:
        road = TritonHttpRoad(port)
        assert to_vectors(await road.embed(["a", "bc"]))[:, 0].tolist() == [1, 2]
        await road.close()


def test_texts_are_packed_with_their_length_in_bytes():
    assert packed(["a", "ö"]) == b"\x01\x00\x00\x00a\x02\x00\x00\x00\xc3\xb6"


@pytest.mark.parametrize(("status", "body"), [(503, b"busy"), (200, b"too short")])
async def test_a_wrong_answer_is_named(status: int, body: bytes):
    async def answer(path: str, sent: bytes) -> tuple[int, str, bytes]:
        return status, "", body

    async with serving(answer) as port:
        road = FastApiRoad(port)
        with pytest.raises(WrongAnswer, match=body.decode()):
            await road.embed(["a"])
        await road.close()


async def test_the_generator_counts_what_a_server_answers():
    asked: list[str] = []

    async def answer(path: str, body: bytes) -> tuple[int, str, bytes]:
        asked.append(json.loads(body)["texts"][0])
        await asyncio.sleep(0.01)
        return await as_fastapi(path, body)

    numbers = iter(range(100_000))
    async with serving(answer) as port:
        roads = [FastApiRoad(port) for _ in range(4)]
        found = await closed_loop(roads, lambda: [str(next(numbers))], 0.3)
        for road in roads:
            await road.close()
    assert len(set(asked)) == len(asked)
    assert 10 <= found.p50_ms <= found.p99_ms
    # 4 clients that wait 10 ms at least; the first answers and the last are not counted.
    assert 4 < found.requests < len(asked)
    assert found.requests_s <= 400


async def test_slow_answers_are_waited_for():
    async def answer(path: str, body: bytes) -> tuple[int, str, bytes]:
        await asyncio.sleep(0.1)
        return await as_fastapi(path, body)

    async with serving(answer) as port:
        roads = [FastApiRoad(port) for _ in range(2)]
        found = await closed_loop(roads, lambda: ["a"], 0.01)
        for road in roads:
            await road.close()
    assert found.requests >= 2
    assert found.requests_s < 21


async def test_a_failing_server_ends_the_load():
    async def answer(path: str, body: bytes) -> tuple[int, str, bytes]:
        return 500, "", b"broken"

    async with serving(answer) as port:
        roads = [FastApiRoad(port) for _ in range(3)]
        with pytest.raises(WrongAnswer, match="broken"):
            await closed_loop(roads, lambda: ["a"], 30)
        for road in roads:
            await road.close()


def test_no_answer_is_no_latency():
    found = summary([], 1.0)
    assert found.requests == 0
    assert found.p50_ms != found.p50_ms


def test_keys_of_loads_are_distinct():
    keys = [load.key for load in loads()]
    assert len(set(keys)) == len(keys)
