# SPDX-License-Identifier: Apache-2.0
"""The gateway's memory: each text is asked for once, and nobody pays for another's departure."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import numpy as np
import pytest

from arrowhead_client import AsyncClient, AsyncFakeTransport, FakeTransport, Request, Unavailable
from arrowhead_server.gateway.embedder import Counts, Embedder


class Slow(AsyncFakeTransport):
    """Answers when it is told to."""

    def __init__(self) -> None:
        super().__init__(FakeTransport())
        self.open = asyncio.Event()

    async def infer(self, request: Request, timeout_s: float) -> dict[str, np.ndarray]:
        await self.open.wait()
        return await super().infer(request, timeout_s)  # type: ignore[return-value]

    def asked(self) -> list[list[bytes]]:
        return [list(r.texts) for r in self.fake.requests if r.outputs == ("embeddings",)]


async def settle(condition: Callable[[], bool] = lambda: False) -> None:
    for _ in range(20):
        if condition():
            return
        await asyncio.sleep(0)


async def test_a_batch_with_one_new_text_asks_for_one() -> None:
    transport = Slow()
    transport.open.set()
    async with AsyncClient(transport=transport) as client:
        embedder = Embedder(client)
        first = await embedder(["a", "b", "a"])
        again = await embedder(["b", "c", "a"])
        assert transport.asked() == [[b"a", b"b"], [b"c"]]
        assert first[0] is first[2] is again[2]
        np.testing.assert_array_equal(again[1].vector, (await client.embed(["c"]))[0])
        assert (again[1].tokens, again[1].truncated) == (1, False)
        assert embedder.counts == Counts(hits=2, merged=0, misses=3)


async def test_who_asks_meanwhile_waits_for_the_same_answer() -> None:
    transport = Slow()
    async with AsyncClient(transport=transport) as client:
        embedder = Embedder(client)
        calls = [asyncio.create_task(embedder(["a", str(number % 2)])) for number in range(10)]
        await settle()
        calls[0].cancel()  # the one who asked goes away
        await settle()
        transport.open.set()
        others = await asyncio.gather(*calls[1:])
        assert sorted(transport.asked()) == [[b"1"], [b"a", b"0"]]
        assert all(other[0] is others[0][0] for other in others)
        assert embedder.counts == Counts(hits=0, merged=17, misses=3)


async def test_a_failure_reaches_all_who_wait_and_is_not_remembered() -> None:
    transport = Slow()
    failing = True

    def answer(request: Request) -> dict[str, np.ndarray]:
        if failing:
            raise Unavailable("gone")
        return transport.fake._made_up(request)  # type: ignore[return-value]

    transport.fake._answer = answer
    async with AsyncClient(transport=transport, retries=0) as client:
        embedder = Embedder(client)
        calls = [asyncio.create_task(embedder(["a"])) for _ in range(3)]
        await settle()
        transport.open.set()
        for call in calls:
            with pytest.raises(Unavailable, match="gone"):
                await call
        failing = False
        assert (await embedder(["a"]))[0].tokens == 1


async def test_those_used_last_are_remembered_and_cannot_be_written_to() -> None:
    transport = Slow()
    transport.open.set()
    async with AsyncClient(transport=transport) as client:
        embedder = Embedder(client, entries=2)
        await embedder(["a"])
        await embedder(["b"])
        await embedder(["a"])
        (c,) = await embedder(["c"])
        assert len(embedder) == 2
        await embedder(["a"])
        await embedder(["b"])
        assert transport.asked() == [[b"a"], [b"b"], [b"c"], [b"b"]]
        with pytest.raises(ValueError, match="read-only"):
            c.vector[0] = 1
        assert c.vector.base is None
