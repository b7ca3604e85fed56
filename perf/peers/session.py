# SPDX-License-Identifier: Apache-2.0
"""One server at a time: started, asked, loaded, looked at, stopped; and what was seen of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from arrowhead_client.datasets import StsPairs
from perf.peers.environments import PeerUnavailable
from perf.peers.generator import Load, Measured, closed_loop, loads
from perf.peers.results import Loaded, ServerResult
from perf.peers.roads import Road, WrongAnswer, to_vectors
from perf.peers.servers import Door, Kind, Running, first_answer
from perf.quality import Closeness
from perf.server import ServeFailed
from perf.stats import Sample, Vectors
from perf.texts import Texts, for_quality, mixed

_BATCH = 32
_WARM_CLIENTS = 8
_FAILURES = (PeerUnavailable, ServeFailed, WrongAnswer, OSError)


@dataclass(frozen=True)
class Amount:
    """How much each server is asked.

    Attributes:
        load_s: seconds of each load.
        warm_s: seconds of one before them that is not counted.
        concurrencies: clients at once, on mixed texts.
        compared: texts whose vectors are compared.
    """

    load_s: float
    warm_s: float
    concurrencies: tuple[int, ...]
    compared: int


@dataclass
class Seen:
    """What was seen of one way into a server, pass by pass."""

    title: str
    kind: str
    start_s: list[float] = field(default_factory=list)
    pss_mb: list[float] = field(default_factory=list)
    measured: dict[str, list[Measured]] = field(default_factory=dict)
    vectors: Vectors | None = None
    sts: float | None = None

    def result(self, key: str, chosen: Sequence[Load], reference: Vectors) -> ServerResult:
        """Medians and spreads over the passes; cosines with the reference's vectors."""
        return ServerResult(
            key=key,
            title=self.title,
            ours=self.kind.startswith("arrowhead"),
            start_s=Sample.of(self.start_s),
            pss_mb=Sample.of(self.pss_mb),
            loads=[
                _loaded(load, self.measured[load.key])
                for load in chosen
                if load.key in self.measured
            ],
            closeness=(
                None if self.vectors is None else Closeness.of(self.title, self.vectors, reference)
            ),
            sts=self.sts,
        )


class Sessions:
    """Serves kinds, one after the other, and remembers what was seen.

    Attributes:
        seen: by the door's key.
        missing: what failed and why, by the kind's title; it is not served again.
    """

    def __init__(self, amount: Amount, pairs: StsPairs | None) -> None:
        self.seen: dict[str, Seen] = {}
        self.missing: dict[str, str] = {}
        self.loads = loads(amount.concurrencies)
        self._amount = amount
        self._pairs = pairs

    def serve(self, loop: asyncio.AbstractEventLoop, kind: Kind, number: int) -> None:
        """Starts a server, measures it, and stops it; `number` is that of the pass."""
        if kind.title in self.missing:
            return
        try:
            with kind.start() as server:
                loop.run_until_complete(self._measure(kind, server, number))
        except _FAILURES as error:
            self.missing[kind.title] = " ".join(str(error).split()) or repr(error)

    async def _measure(self, kind: Kind, server: Running, number: int) -> None:
        start_s = await first_answer(server)
        found: list[tuple[Door, dict[str, Measured]]] = []
        for place, door in enumerate(server.doors):
            # The same texts for every server, and none of them twice for any.
            source = Texts(seed=1000 + 10 * number + place)
            warm = Load("warm", "", mixed, clients=_WARM_CLIENTS)
            await _load(door, warm, source, self._amount.warm_s)
            measured = {}
            for load in self.loads:
                measured[load.key] = await _load(door, load, source, self._amount.load_s)
            found.append((door, measured))
        pss_mb = server.pss_mb()
        for door, measured in found:
            seen = self.seen.setdefault(door.key, Seen(door.title, kind.key))
            seen.start_s.append(start_s)
            seen.pss_mb.append(pss_mb)
            for key, one in measured.items():
                seen.measured.setdefault(key, []).append(one)
        if number == 0:
            await self._look_at_vectors(server.doors[0])

    async def _look_at_vectors(self, door: Door) -> None:
        road = door.road()
        try:
            seen = self.seen[door.key]
            seen.vectors = await _embed(road, for_quality(self._amount.compared))
            if self._pairs is not None:
                left = await _embed(road, self._pairs.left)
                seen.sts = self._pairs.percent(left, await _embed(road, self._pairs.right))
        finally:
            await road.close()


async def _load(door: Door, load: Load, source: Texts, seconds: float) -> Measured:
    def make() -> list[str]:
        return [load.make(source) for _ in range(load.texts)]

    roads = door.roads(load.clients)
    try:
        return await closed_loop(roads, make, seconds)
    finally:
        for road in set(roads):
            await road.close()


async def _embed(road: Road, texts: Sequence[str]) -> Vectors:
    parts = [texts[first : first + _BATCH] for first in range(0, len(texts), _BATCH)]
    return to_vectors(b"".join([await road.embed(part) for part in parts]))


def _loaded(load: Load, runs: Sequence[Measured]) -> Loaded:
    def sample(value: Callable[[Measured], float]) -> Sample:
        # A run so short that nothing was answered in it says nothing of latencies.
        return Sample.of([value(run) for run in runs if run.requests] or [float("nan")])

    return Loaded(
        load.key,
        load.title,
        load.clients,
        p50_ms=sample(lambda run: run.p50_ms),
        p99_ms=sample(lambda run: run.p99_ms),
        requests_s=Sample.of([run.requests_s for run in runs]),
        requests=sum(run.requests for run in runs),
    )
