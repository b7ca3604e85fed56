# SPDX-License-Identifier: Apache-2.0
"""Who does not take answers, over real connections: nothing is held for them for long."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
import uvicorn
from prometheus_client import CollectorRegistry, Gauge
from starlette.types import Receive, Scope, Send

from arrowhead_client import ArrowheadError
from arrowhead_server.gateway import protocol
from arrowhead_server.gateway.access import Access
from arrowhead_server.gateway.bodies import Bodies
from arrowhead_server.gateway.call import Call
from arrowhead_server.gateway.failures import Forbidden, TooFast
from arrowhead_server.gateway.gate import Gate
from arrowhead_server.gateway.metrics import Metrics
from arrowhead_server.gateway.protocol import MOST_PIPELINED, CappedProtocol
from arrowhead_server.gateway.rates import Rates
from arrowhead_server.gateway.settings import Settings
from arrowhead_server.gateway.spans import Spans

SIZE = 64 * 2**20  # more than the system's buffers hold
BIG = b"GET /big HTTP/1.1\r\nHost: a\r\n\r\n"


async def big(scope: Scope, receive: Receive, send: Send) -> None:
    body = b"0123456789abcdef" * (SIZE // 16)
    headers = [(b"content-length", str(SIZE).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def answer(path: str, error: ArrowheadError) -> Any:
    raise AssertionError(f"{path} was refused: {error}")


def gate_of(rates: Rates | None = None) -> Gate:
    gauge = Gauge("held", "bytes", registry=CollectorRegistry())
    access = Access(Settings("grpc://127.0.0.1:1", "minilm"))
    return Gate(big, access, rates, Bodies(10**6, 10**9, gauge), 100, Metrics(), answer, Spans())


@asynccontextmanager
async def serving(gate: Gate) -> AsyncIterator[tuple[uvicorn.Server, int]]:
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(gate, http=CappedProtocol, lifespan="off", log_config=None)
    server = uvicorn.Server(config)
    task = asyncio.create_task(server._serve([listener]))
    await until(lambda: server.started)
    yield server, listener.getsockname()[1]
    server.should_exit = True
    await asyncio.wait_for(task, 30)


async def until(condition: Callable[[], bool]) -> None:
    async def wait() -> None:
        while not condition():
            await asyncio.sleep(0.01)

    await asyncio.wait_for(wait(), 30)


async def test_who_takes_an_answer_gets_all_of_it() -> None:
    async with serving(gate_of()) as (_, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in range(2):  # the connection is kept
            writer.write(BIG)
            head = await reader.readuntil(b"\r\n\r\n")
            assert str(SIZE).encode() in head
            assert await reader.readexactly(SIZE) == b"0123456789abcdef" * (SIZE // 16)
        writer.close()
        await writer.wait_closed()


async def test_who_takes_nothing_keeps_a_place_and_is_hung_up_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(protocol, "SEND_S", 0.5)
    gate = gate_of()
    async with serving(gate) as (server, port):
        _, writer = await asyncio.open_connection("127.0.0.1", port, limit=1)
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        writer.write(BIG)
        await until(lambda: gate._under_way == 1)
        await asyncio.sleep(0.2)
        (connection,) = server.server_state.connections
        assert gate._under_way == 1
        assert connection.transport.get_write_buffer_size() < 2**20
        await until(lambda: gate._under_way == 0)
        await until(lambda: not server.server_state.connections)
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()
    assert caplog.text == ""


SLOW_HEAD = b"GET /big HTTP/1.1\r\nX: "  # and x for as long as one likes


@pytest.mark.parametrize(
    ("before", "drop"), [(b"", b""), (SLOW_HEAD, b"x"), (BIG + SLOW_HEAD, b"x")]
)
async def test_who_does_not_end_a_head_is_hung_up_on(
    monkeypatch: pytest.MonkeyPatch, before: bytes, drop: bytes
) -> None:
    monkeypatch.setattr(protocol, "HEAD_S", 0.5)
    async with serving(gate_of()) as (server, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(before)
        drip = asyncio.create_task(dripped(writer, drop))
        began = asyncio.get_running_loop().time()
        with suppress(ConnectionError):
            while await reader.read(2**20):
                pass
        assert asyncio.get_running_loop().time() - began >= 0.4
        await until(lambda: not server.server_state.connections)
        writer.close()
        await drip
        with suppress(ConnectionError):
            await writer.wait_closed()


async def dripped(writer: asyncio.StreamWriter, drop: bytes) -> None:
    for _ in range(600):
        if writer.is_closing():
            return
        writer.write(drop)
        await asyncio.sleep(0.05)
    raise AssertionError("was listened to on and on")


async def test_a_head_that_came_in_time_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "HEAD_S", 0.3)
    async with serving(gate_of()) as (_, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in range(2):
            writer.write(BIG)
            await reader.readuntil(b"\r\n\r\n")
            await asyncio.sleep(0.6)  # its answer is taken later
            assert len(await reader.readexactly(SIZE)) == SIZE
        writer.close()
        await writer.wait_closed()


async def test_who_asks_on_and_on_is_hung_up_on(caplog: pytest.LogCaptureFixture) -> None:
    gate = gate_of()
    async with serving(gate) as (server, port):
        _, writer = await asyncio.open_connection("127.0.0.1", port, limit=1)
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        writer.write(BIG * MOST_PIPELINED)
        await until(lambda: gate._under_way == 1)
        await asyncio.sleep(0.1)
        assert server.server_state.connections
        writer.write(BIG)
        await until(lambda: not server.server_state.connections)
        await until(lambda: gate._under_way == 0)
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()
    assert caplog.text == ""


async def test_tokens_that_lack_a_scope_are_counted_where_they_come_from(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gate = gate_of(Rates("2/hour"))

    async def forbidden(scope: Scope) -> str:
        raise Forbidden("no scope", ["embed"])

    monkeypatch.setattr(gate._access, "caller", forbidden)
    scope = {"type": "http", "headers": [], "client": ("192.0.2.1", 1)}
    for error in (Forbidden, Forbidden, TooFast):
        with pytest.raises(error):
            await gate._counted(scope, Call("an-id"))
