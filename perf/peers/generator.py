# SPDX-License-Identifier: Apache-2.0
"""Clients in a closed loop: each asks, reads the answer, asks again. The same for every server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from perf.load import CONCURRENCIES
from perf.peers.roads import Road
from perf.texts import Texts, mixed, of_tokens

_LONGEST_WAIT_S = 4.0  # for one answer a client, before the clock starts and at its end


@dataclass(frozen=True)
class Load:
    """One kind of load.

    Attributes:
        key: its name in the results.
        title: what a request holds, for people.
        make: makes a text.
        texts: in one request.
        clients: at once, each with one request in flight.
    """

    key: str
    title: str
    make: Callable[[Texts], str]
    texts: int = 1
    clients: int = 1


@dataclass(frozen=True)
class Measured:
    """One run: latencies in milliseconds, requests answered in a second, and how many those are."""

    p50_ms: float
    p99_ms: float
    requests_s: float
    requests: int


def loads(concurrencies: Sequence[int] = CONCURRENCIES) -> list[Load]:
    """All loads; results, page and plots know them by their keys."""
    return [
        Load("t12", "one text of 12 tokens", of_tokens(12)),
        Load("t128", "one text of 128 tokens", of_tokens(128)),
        Load("b32", "32 texts of 16 tokens", of_tokens(16), texts=32),
        *(Load(f"mixed_{n}", "one text of 5-60 words", mixed, clients=n) for n in concurrencies),
    ]


async def closed_loop(
    roads: Sequence[Road], make: Callable[[], list[str]], seconds: float
) -> Measured:
    """Lets a client on each road ask for what `make` gives, for so long.

    The clock starts at the moment when every client has had an answer, and stops at the last answer
    within so many seconds, or at the first after them by which there is one a client. So it runs
    from answer to answer: servers that work in batches give theirs in bursts, and a clock stopped
    between two bursts would count one too few.

    Raises:
        WrongAnswer, OSError: a request failed; the others are given up.
    """
    took: list[tuple[float, float]] = []  # when an answer came, and after how long
    unanswered = set(range(len(roads)))
    warm, enough, ending, counted_from = asyncio.Event(), asyncio.Event(), False, 0

    async def client(number: int, road: Road) -> None:
        while not ending:
            texts = make()
            began = time.perf_counter()
            await road.embed(texts)
            ended = time.perf_counter()
            took.append((ended, ended - began))
            unanswered.discard(number)
            if not unanswered:
                warm.set()
            if counted_from and len(took) - counted_from >= len(roads):
                enough.set()

    clients = [asyncio.ensure_future(client(*one)) for one in enumerate(roads)]
    for task in clients:  # one that failed shall not be waited for
        task.add_done_callback(lambda _: warm.set())
        task.add_done_callback(lambda _: enough.set())
    try:
        await _within(warm, _LONGEST_WAIT_S)
        start, counted_from = time.perf_counter(), len(took)
        await asyncio.wait(clients, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
        await _within(enough, _LONGEST_WAIT_S)
        ending, counted = True, took[counted_from:]
        await asyncio.gather(*clients)
    finally:
        for task in clients:
            task.cancel()
        await asyncio.gather(*clients, return_exceptions=True)
    end = counted[-1][0] if counted else time.perf_counter()
    return summary([latency for _, latency in counted], end - start)


async def _within(event: asyncio.Event, seconds: float) -> None:
    with suppress(asyncio.TimeoutError):
        await asyncio.wait_for(event.wait(), seconds)


def summary(latencies: Sequence[float], seconds: float) -> Measured:
    """What so many answers in so much time amount to; all NaN but the rate if there were none."""
    if not latencies:
        return Measured(float("nan"), float("nan"), 0.0, 0)
    p50, p99 = np.percentile(latencies, [50, 99])
    return Measured(float(p50) * 1e3, float(p99) * 1e3, len(latencies) / seconds, len(latencies))
