# SPDX-License-Identifier: Apache-2.0
"""Ten times as many requests as can be answered, whether answers come or not (an open loop).

It must cost little, for it runs on the machine that it measures: requests are bytes made
beforehand, connections are kept, and what was refused is only counted.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import resource
import signal
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple
from urllib.parse import urlsplit

import numpy as np
import orjson
import psutil
import uvloop

from deploy.stack import Stack
from perf.common import end_as_ctrl_c_does
from perf.faults_load import WRONG, GatewayRoad, Known, answered, unseen

_TICK_S = 0.005
_MOST_CONNECTIONS = 1100  # HAProxy is not asked for more than it lets in
_PEAK_CALLERS = 128
_LAST_S = 5.0  # what was sent last is awaited for so long


@dataclass(frozen=True)
class Overload:
    """What came of it.

    Attributes:
        seconds: how long it lasted.
        peak_s: right answers a second to callers who wait for theirs: the mean of before and after,
            for a machine is not always as fast.
        good_s: right answers a second under overload.
        callers_cores: cores that the callers, who are on this machine, took of it: at the peak, and
            under overload.
        cores: of the machine.
        offered: requests that were due; `unsent` of them were not sent, for no connection was free.
        statuses: of the answers, by status; "none" where the connection ended.
        wrong: 200 with other vectors than the right ones.
        untold: 429 and 503 without Retry-After.
        p50_ms, p99_ms, worst_ms: of good answers.
        refused_p99_ms: of 429 and 503.
        recovery_s: from its end to the first of ten answers in a row as quick as before it.
        memory_mb: of gateways and HAProxy, before it and at most meanwhile.
    """

    seconds: float
    peak_s: float
    good_s: float
    offered: int
    unsent: int
    statuses: dict[str, int]
    wrong: int
    untold: int
    p50_ms: float
    p99_ms: float
    worst_ms: float
    refused_p99_ms: float
    recovery_s: float
    memory_mb: tuple[float, float]
    callers_cores: tuple[float, float]
    cores: int

    @property
    def share(self) -> float:
        """Right answers under overload, of those at the peak."""
        return self.good_s / max(self.peak_s, 1e-9)

    @property
    def own_share(self) -> float:
        """The same for each core that the callers left: ten times as many take more themselves."""
        at_peak, overloaded = (self.cores - callers for callers in self.callers_cores)
        return self.share * at_peak / overloaded


class _Connection(asyncio.Protocol):
    """Sends one request after another, and tells `done` of each answer."""

    def __init__(self, flood: _Flood) -> None:
        self._flood = flood
        self._sent_at = 0.0
        self._place = 0
        self._under_way = False
        self._buffer = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._flood.opened(self)
        self._flood.free(self)

    def send(self, place: int, request: bytes) -> None:
        """Asks for the vector of the text at this place."""
        self._place, self._sent_at, self._under_way = place, time.perf_counter(), True
        self._transport.write(request)  # type: ignore[attr-defined]

    def close(self) -> None:
        """Hangs up."""
        self._under_way = False
        self._transport.abort()  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        head = bytes(self._buffer[:end]).lower()
        start = head.find(b"content-length:")
        length = int(head[start + 15 :].split(b"\r\n", 1)[0]) if start >= 0 else 0
        if len(self._buffer) < end + 4 + length:
            return
        body = bytes(self._buffer[end + 4 :])
        self._buffer.clear()
        self._under_way = False
        self._flood.answered(head, body, self._place, time.perf_counter() - self._sent_at)
        if b"connection: close" in head:
            self._transport.close()
        else:
            self._flood.free(self)

    def connection_lost(self, error: Exception | None) -> None:
        self._flood.lost(self, self._under_way)


class _Flood:
    """Requests to the gateways over many connections."""

    def __init__(self, url: str, known: Known, texts: Iterator[tuple[int, str]]) -> None:
        place = urlsplit(url)
        self._host, self._port = str(place.hostname), place.port or 80
        self._known, self._texts = known, texts
        self._head = (
            f"POST /embed HTTP/1.1\r\nHost: {self._host}\r\nContent-Type: application/json\r\n"
            "Content-Length: "
        ).encode()
        self._idle: deque[_Connection] = deque()
        self._open: set[_Connection] = set()
        self.closed_loop = False
        self.reset()

    def reset(self) -> None:
        """Forgets what was counted."""
        self.statuses: Counter[str] = Counter()
        self.offered = self.unsent = self.wrong = self.untold = 0
        self.good: list[float] = []
        self.refused: list[float] = []

    def answered(self, head: bytes, body: bytes, place: int, took: float) -> None:
        """Notes an answer."""
        status = head[9:12].decode()
        self.statuses[status] += 1
        if status == "200":
            vector = np.array(orjson.loads(body), np.float32)
            if self._known.version([place], vector):
                self.good.append(took)
            else:
                self.wrong += 1
                self.statuses[WRONG] += 1
        else:
            self.refused.append(took)
            self.untold += status in ("429", "503") and b"\r\nretry-after:" not in head

    def ask(self, connection: _Connection) -> None:
        """Has a connection send the next request."""
        place, text = next(self._texts)
        body = orjson.dumps({"inputs": text})
        connection.send(place, b"%b%d\r\n\r\n%b" % (self._head, len(body), body))

    def free(self, connection: _Connection) -> None:
        """A connection has nothing to do."""
        if self.closed_loop:
            self.ask(connection)
        else:
            self._idle.append(connection)

    def opened(self, connection: _Connection) -> None:
        """A connection is there."""
        self._open.add(connection)

    def lost(self, connection: _Connection, under_way: bool) -> None:
        """A connection ended."""
        self._open.discard(connection)
        if under_way:
            self.statuses["none"] += 1
        elif connection in self._idle:
            self._idle.remove(connection)

    async def connect(self, count: int) -> None:
        """Opens more connections."""
        loop = asyncio.get_running_loop()
        made = [
            loop.create_connection(lambda: _Connection(self), self._host, self._port)
            for _ in range(count)
        ]
        await asyncio.gather(*made, return_exceptions=True)

    async def close(self) -> None:
        """Hangs up."""
        for connection in self._open:
            connection.close()
        while self._open:
            await asyncio.sleep(_TICK_S)

    async def run(self, rate: float, seconds: float, each_second: Callable[[], object]) -> None:
        """Sends so many a second; those that find no connection are counted."""
        began, sent, second = time.perf_counter(), 0, 0
        opening: asyncio.Task[None] | None = None
        while (elapsed := time.perf_counter() - began) < seconds:
            due = int(elapsed * rate) - sent
            for _ in range(due):
                if self._idle:
                    self.ask(self._idle.popleft())
                else:
                    self.unsent += 1
            sent += due
            wanting = len(self._idle) < 20 and len(self._open) < _MOST_CONNECTIONS
            if wanting and (opening is None or opening.done()):
                opening = asyncio.ensure_future(self.connect(50))
            if elapsed > second:
                second += 1
                each_second()
            await asyncio.sleep(_TICK_S)
        self.offered = sent
        if opening is not None:
            await opening


def overload(stack: Stack, known: Known, seconds: float, *, times: float = 10.0) -> Overload:
    """Floods the gateways for so long with so many times their peak."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        return uvloop.run(_overload(stack, known, seconds, times))
    except asyncio.CancelledError:  # by SIGTERM, which uvloop keeps to itself
        raise KeyboardInterrupt from None
    finally:
        end_as_ctrl_c_does()


async def _overload(stack: Stack, known: Known, seconds: float, times: float) -> Overload:
    if (own := asyncio.current_task()) is not None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, own.cancel)
    processes = [psutil.Process(stack.pid(name)) for name in stack.names if name[0] in "gh"]
    processes += [child for one in processes for child in one.children(recursive=True)]

    def memory_mb() -> float:
        total = 0
        for one in processes:
            with suppress(psutil.NoSuchProcess):  # a worker of HAProxy's before a reload
                total += one.memory_info().rss
        return total / 1e6

    texts, road = _fresh(known), GatewayRoad(stack.gateway_url)
    before = await _peak(stack, known, texts, max(5.0, seconds / 4))
    usual_s = [await _waited(road, known, next(texts)) for _ in range(20)]
    flood = _Flood(stack.gateway_url, known, texts)
    memory, most = memory_mb(), 0.0

    def look() -> None:
        nonlocal most
        most = max(most, memory_mb())

    worked_s = _worked_s()
    await flood.run(times * before.rate_s, seconds, look)
    good_s, ended = len(flood.good) / seconds, time.perf_counter()
    flooding = (_worked_s() - worked_s) / seconds
    in_a_row, recovered = 0, ended
    while in_a_row < 10 and time.perf_counter() - ended < 60:
        began = time.perf_counter()
        took = await _waited(road, known, next(texts))
        in_a_row = in_a_row + 1 if took < max(2 * max(usual_s), 0.1) else 0
        recovered = began if in_a_row == 1 else recovered
    await road.close()
    await asyncio.sleep(_LAST_S)
    look()
    await flood.close()
    after = await _peak(stack, known, texts, max(5.0, seconds / 4))
    good = [took * 1e3 for took in flood.good] or [float("nan")]
    refused = [took * 1e3 for took in flood.refused] or [float("nan")]
    return Overload(
        seconds=seconds,
        peak_s=(before.rate_s + after.rate_s) / 2,
        good_s=good_s,
        offered=flood.offered,
        unsent=flood.unsent,
        statuses=dict(flood.statuses.most_common()),
        wrong=flood.wrong + before.wrong + after.wrong,
        untold=flood.untold,
        p50_ms=float(np.percentile(good, 50)),
        p99_ms=float(np.percentile(good, 99)),
        worst_ms=max(good),
        refused_p99_ms=float(np.percentile(refused, 99)),
        recovery_s=recovered - ended,
        memory_mb=(memory, most),
        callers_cores=((before.callers_cores + after.callers_cores) / 2, flooding),
        cores=os.cpu_count() or 1,
    )


class _Peak(NamedTuple):
    """Right answers a second to callers who wait for theirs, how many were wrong, who took what."""

    rate_s: float
    wrong: int
    callers_cores: float


async def _peak(
    stack: Stack, known: Known, texts: Iterator[tuple[int, str]], seconds: float
) -> _Peak:
    peak = _Flood(stack.gateway_url, known, texts)
    peak.closed_loop = True
    await peak.connect(_PEAK_CALLERS)
    await asyncio.sleep(2.0)  # not counted: they warm up
    peak.reset()
    worked_s = _worked_s()
    await asyncio.sleep(seconds)
    found = _Peak(len(peak.good) / seconds, peak.wrong, (_worked_s() - worked_s) / seconds)
    peak.closed_loop = False
    await asyncio.sleep(2.0)
    await peak.close()  # its places at HAProxy are the flood's
    return found


def _worked_s() -> float:
    """Seconds that this process has worked."""
    times = os.times()
    return times.user + times.system


def _fresh(known: Known) -> Iterator[tuple[int, str]]:
    """Places of texts, and texts that nobody asked for before."""
    for place, text in itertools.cycle(enumerate(known.texts)):
        yield place, unseen(text)


async def _waited(road: GatewayRoad, known: Known, asked: tuple[int, str]) -> float:
    """Seconds that one caller waits for a right answer; infinite if it is none."""
    place, text = asked
    began = time.perf_counter()
    _, failure = await answered(road, known, [place], [text])
    return float("inf") if failure else time.perf_counter() - began
