# SPDX-License-Identifier: Apache-2.0
"""The gateway's memory and its lanes: each text is computed once, and nobody pays for others."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from arrowhead_client import (
    AsyncClient,
    AsyncFakeTransport,
    FakeTransport,
    InvalidInput,
    Request,
    TextTooLong,
    Unavailable,
)
from arrowhead_engine.tokenizer import Tokenizer
from arrowhead_server.gateway import embedder as module
from arrowhead_server.gateway.call import CALL, Call
from arrowhead_server.gateway.embedder import BULK, INTERACTIVE, Counts, Embedded, Embedder

LONG = "word " * 300


class Slow(AsyncFakeTransport):
    """Answers when it is told to."""

    def __init__(self) -> None:
        super().__init__(FakeTransport())
        self.open = asyncio.Event()

    async def infer(self, request: Request, timeout_s: float) -> Any:
        if request.outputs == ("embeddings",):
            self.fake.requests.append(request)
            await self.open.wait()
        return self.fake._answer(request) if self.fake._answer else self.fake._made_up(request)

    def asked(self) -> list[int]:
        """How many texts each request had."""
        return [len(r) for r in self.fake.requests if r.outputs == ("embeddings",)]


@pytest.fixture(scope="module")
def tokenizer(minilm_repository: Path) -> Tokenizer:
    return Tokenizer.open(minilm_repository / "minilm_tokenizer" / "1")


@pytest.fixture
async def transport() -> Slow:
    return Slow()


async def embedder_of(transport: Slow, tokenizer: Tokenizer, entries: int = 100) -> Embedder:
    client = AsyncClient(transport=transport, retries=0, batch_size=100)
    return Embedder(client, await client.info(), tokenizer, Counts(), entries)


async def settle(condition: Callable[[], bool] = lambda: False) -> None:
    for _ in range(50):
        if condition():
            return
        await asyncio.sleep(0)


async def test_a_batch_with_one_new_text_asks_for_one(
    transport: Slow, tokenizer: Tokenizer
) -> None:
    transport.open.set()
    embedder = await embedder_of(transport, tokenizer)
    first = await embedder(["a", "b", "a"])
    again = await embedder(["b", "c", "a"])
    assert transport.asked() == [2, 1]
    assert first[0] is first[2] is again[2]
    (ids,), _ = tokenizer.encode(["c"])
    assert (again[1].tokens, again[1].truncated) == (3, False)
    # The very ids that the tokenizer gives, of the very version.
    np.testing.assert_array_equal(transport.fake.requests[-1].ids[0], ids)
    assert transport.fake.requests[-1].version == embedder.info.version
    (same,) = await embedder([tuple(ids)])
    np.testing.assert_array_equal(same.vector, again[1].vector)
    assert embedder.counts == Counts(hits=2, merged=0, misses=4, sent_tokens=12)


async def test_who_asks_meanwhile_waits_for_the_same_answer(
    transport: Slow, tokenizer: Tokenizer
) -> None:
    embedder = await embedder_of(transport, tokenizer)
    calls = [asyncio.create_task(embedder(["a", str(number % 2)])) for number in range(10)]
    await settle()
    calls[0].cancel()  # the one who asked goes away
    await settle()
    transport.open.set()
    others = await asyncio.gather(*calls[1:])
    assert transport.asked() == [2, 1]
    assert all(other[0] is others[0][0] for other in others)
    assert embedder.counts == Counts(hits=0, merged=17, misses=3, sent_tokens=9)


async def test_a_request_has_the_ids_of_all_who_wait_for_its_texts(
    transport: Slow, tokenizer: Tokenizer
) -> None:
    embedder = await embedder_of(transport, tokenizer)

    def ask(name: str, *texts: str) -> asyncio.Task[list[Embedded]]:
        context = contextvars.copy_context()
        context.run(CALL.set, Call(name))
        return context.run(asyncio.create_task, embedder(texts))

    under_way = [ask(f"under-way-{number}", f"text {number}") for number in range(INTERACTIVE)]
    await settle()
    tasks = [ask("first", "a", "b"), ask("second", "b", "c", "a"), ask("third", "a", "text 0")]
    tasks += [ask(f"many-{number}", "c") for number in range(300)]
    await settle()
    transport.open.set()
    await asyncio.gather(*under_way, *tasks)
    *first, gathered = [request.id for request in transport.fake.requests[-INTERACTIVE - 1 :]]
    assert first == [f"under-way-{number}" for number in range(INTERACTIVE)]
    many = [f"many-{number}" for number in range(197)]
    assert gathered.split(",") == ["first", "second", "third", *many]


async def test_what_gathers_meanwhile_goes_as_one_request(
    transport: Slow, tokenizer: Tokenizer
) -> None:
    embedder = await embedder_of(transport, tokenizer)
    calls = [asyncio.create_task(embedder([f"text {number}"])) for number in range(20)]
    await settle()
    assert transport.asked() == [1] * INTERACTIVE
    transport.open.set()
    for (met,) in await asyncio.gather(*calls):
        assert met.tokens == 4
    assert transport.asked() == [*[1] * INTERACTIVE, 20 - INTERACTIVE]


async def test_a_text_passes_a_long_list(transport: Slow, tokenizer: Tokenizer) -> None:
    embedder = await embedder_of(transport, tokenizer, entries=1000)
    many = asyncio.create_task(embedder([f"{number} {LONG}" for number in range(40)]))
    while not transport.asked():  # tokenized beside the loop
        await asyncio.sleep(0.001)
    one = asyncio.create_task(embedder(["a"]))
    await settle(lambda: len(transport.asked()) > BULK)
    # 1,024 tokens a part: four texts of 256. The short text did not wait for the other eight parts.
    assert transport.asked() == [4] * BULK + [1]
    transport.open.set()
    assert (await one)[0].tokens == 3
    assert [met.truncated for met in await many] == [True] * 40
    assert transport.asked() == [*[4] * BULK, 1, *[4] * (10 - BULK)]


async def test_a_failure_reaches_all_who_wait_and_is_not_remembered(
    transport: Slow, tokenizer: Tokenizer
) -> None:
    failing = True

    def answer(request: Request) -> Any:
        if failing and request.outputs == ("embeddings",):
            raise Unavailable("gone")
        return transport.fake._made_up(request)

    transport.fake._answer = answer
    embedder = await embedder_of(transport, tokenizer)
    calls = [asyncio.create_task(embedder(["a"])) for _ in range(3)]
    await settle()
    transport.open.set()
    for call in calls:
        with pytest.raises(Unavailable, match="gone"):
            await call
    failing = False
    assert (await embedder(["a"]))[0].tokens == 3


class Failing:
    """A tokenizer that fails once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.fails = True

    def encode(self, texts: list[str]) -> Any:
        if self.fails:
            self.fails = False
            raise RuntimeError("panic")
        return self._tokenizer.encode(texts)


@pytest.mark.parametrize("text", ["a", "word " * 10_000])  # in the event loop, and beside it
async def test_nobody_waits_for_a_text_that_could_not_be_tokenized(
    transport: Slow, tokenizer: Tokenizer, text: str
) -> None:
    transport.open.set()
    embedder = await embedder_of(transport, tokenizer)
    embedder.tokenizer = Failing(tokenizer)  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match="panic"):
        await embedder([text])
    (met,) = await asyncio.wait_for(embedder([text]), 30)
    assert met.vector.any()


async def test_wrong_ids_are_told_before_anything_is_sent(
    transport: Slow, tokenizer: Tokenizer
) -> None:
    embedder = await embedder_of(transport, tokenizer)
    for wrong, error, told in (
        ((), InvalidInput, "input 1 is empty"),
        ((1, -1), InvalidInput, r"ids of -1\.\.1: wanted .* 0\.\.30521"),
        ((30522,), InvalidInput, r"0\.\.30521"),
        ((1,) * 257, TextTooLong, "257 token ids: wanted 256 at most"),
    ):
        with pytest.raises(error, match=told):
            await embedder([(1, 2), wrong])
    assert transport.asked() == []


async def test_those_used_last_are_remembered_and_cannot_be_written_to(
    transport: Slow, tokenizer: Tokenizer
) -> None:
    transport.open.set()
    embedder = await embedder_of(transport, tokenizer, entries=2)
    for text in ("a", "b", "a"):
        await embedder([text])
    (c,) = await embedder(["c"])
    assert len(embedder) == 2
    await embedder(["a"])
    assert len(transport.asked()) == 3
    await embedder(["b"])
    assert len(transport.asked()) == 4
    with pytest.raises(ValueError, match="read-only"):
        c.vector[0] = 1
    assert c.vector.base is None


async def test_while_short_requests_come_a_long_list_has_one_part_at_triton(
    transport: Slow, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "QUIET_S", 1000.0)
    embedder = await embedder_of(transport, tokenizer, entries=1000)
    one = asyncio.create_task(embedder(["a"]))
    await settle(lambda: len(transport.asked()) == 1)
    many = asyncio.create_task(embedder([f"{number} {LONG}" for number in range(40)]))
    while len(transport.asked()) < 2:  # tokenized beside the loop
        await asyncio.sleep(0.001)
    await settle()
    assert transport.asked() == [1, 4]
    transport.open.set()
    await one
    assert len(await many) == 40
    assert transport.asked() == [1, *[4] * 10]


async def test_long_texts_are_remembered_without_being_kept(
    transport: Slow, tokenizer: Tokenizer
) -> None:
    transport.open.set()
    embedder = await embedder_of(transport, tokenizer)
    texts = [LONG + end for end in ("a", "b", "ü", "u\u0308")]
    ids = [(101, *[7] * 200, last) for last in (8, 9)]
    first = await embedder([*texts, *ids])
    again = await embedder([*texts, *ids])
    assert all(one is other for one, other in zip(first, again, strict=True))
    assert embedder.counts == Counts(hits=6, merged=0, misses=6, sent_tokens=1428)
    assert max(len(name) for name in embedder._known) <= 64


async def test_what_is_served_no_more_gives_its_memory_back_at_once(
    transport: Slow, tokenizer: Tokenizer
) -> None:
    transport.open.set()
    embedder = await embedder_of(transport, tokenizer)
    await embedder(["a text", "another"])
    gone = weakref.ref(embedder)
    gc.disable()  # a new version comes rarely, and so does Python's look for cycles
    try:
        del embedder
        await asyncio.sleep(0)
        assert gone() is None
    finally:
        gc.enable()
