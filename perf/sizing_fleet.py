# SPDX-License-Identifier: Apache-2.0
"""A fleet of servers behind balancers, event by event (simpy). Milliseconds throughout.

A request goes to a balancer (HAProxy), which gives it to a replica by its rule. A replica takes all
that wait, up to a hundred texts, holds them as long as `Service` says, and answers them together:
Triton's dynamic batcher without a delay. What a replica held when it died is asked of another, as
HAProxy does.

    fleet = Fleet(service, replicas=3, seed=1)
    fleet.arrive(poisson(rate_s=500, seconds=60), mixed)
    fleet.run().percentile(99)
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import simpy

from perf.sizing_service import MOST_TEXTS, Service, Tokens

Times = npt.NDArray[np.float64]
Event = Generator[simpy.Event, Any, None]
RULES = ("round robin", "random", "two choices", "least requests")


def poisson(random: np.random.Generator, rate_s: float, seconds: float) -> Times:
    """Moments, in ms, of arrivals that know nothing of each other."""
    count = int(rate_s * seconds * 1.1 + 10 * math.sqrt(rate_s * seconds) + 10)
    moments: Times = np.cumsum(random.exponential(1e3 / rate_s, count))
    return moments[moments < seconds * 1e3]


def bursty(random: np.random.Generator, rate_s: float, seconds: float) -> Times:
    """The same on average, in bursts: at twice the rate for a fifth of the time.

    Bursts last half a second on average; between them there is as much less.
    """
    high, share, burst_ms = 2.0, 0.2, 500.0
    low = (1 - share * high) / (1 - share)
    moments, now, is_burst = [], 0.0, False
    while now < seconds * 1e3:
        mean = burst_ms if is_burst else burst_ms * (1 - share) / share
        length = random.exponential(mean)
        rate = rate_s * (high if is_burst else low)
        moments.append(now + poisson(random, rate, length / 1e3))
        now, is_burst = now + length, not is_burst
    every: Times = np.concatenate(moments)
    return every[every < seconds * 1e3]


@dataclass
class Request:
    """One text under way."""

    came: float
    tokens: int
    balancer: int
    replica: int = -1
    answered: simpy.Event | None = None


@dataclass
class Replica:
    """A server. It takes work while `is_up`; a balancer sends it some while `is_offered`."""

    queue: deque[Request] = field(default_factory=deque)
    held: list[Request] = field(default_factory=list)
    is_up: bool = True
    is_offered: bool = True
    wake: simpy.Event | None = None
    process: simpy.Process | None = None


@dataclass(frozen=True)
class Answers:
    """When requests came, and how long they took, in the order of their answers."""

    came: Times
    ms: Times
    seconds: float

    def percentile(self, percent: float) -> float:
        """The latency that so many percent of the requests did not exceed."""
        return float(np.percentile(self.ms, percent))

    @property
    def requests_s(self) -> float:
        """Answered in a second."""
        return len(self.ms) / self.seconds

    def between(self, begin_s: float, end_s: float) -> Answers:
        """Those that came in that time."""
        some = (self.came >= begin_s * 1e3) & (self.came < end_s * 1e3)
        return Answers(self.came[some], self.ms[some], end_s - begin_s)


class Fleet:
    """Replicas and balancers, to be run once.

    Args:
        service: what each replica takes.
        replicas: at first.
        rule: one of `RULES`; "least requests" is HAProxy's leastconn, which over HTTP/2 counts
            requests under way.
        balancers: each knows of its own requests only.
        room: requests under way at most; what is beyond is refused, as the gateways do.
        seed: the same fleet with the same seed does the same.

    Attributes:
        refused: moments, in ms.
    """

    def __init__(
        self,
        service: Service,
        replicas: int,
        *,
        rule: str = "least requests",
        balancers: int = 2,
        room: float = math.inf,
        seed: int = 1,
    ) -> None:
        self._room = room
        self.refused: list[float] = []
        self.under_way = 0
        self.service = service
        self.environment = simpy.Environment()
        self.random = np.random.default_rng(seed)
        self.replicas: list[Replica] = []
        self._choose: Callable[[int], int] = {
            "round robin": self._next_one,
            "random": self._any,
            "two choices": self._better_of_two,
            "least requests": self._least,
        }[rule]
        self._normal = self._drawn()
        self._turn = [0] * balancers
        self._under_way: list[list[int]] = [[] for _ in range(balancers)]
        self._offered: list[int] = []
        self._came: list[float] = []
        self._ms: list[float] = []
        for _ in range(replicas):
            self.add()

    def add(self) -> None:
        """One more replica, at work at once."""
        replica = Replica()
        self.replicas.append(replica)
        for counts in self._under_way:
            counts.append(0)
        replica.process = self.environment.process(self._serve(replica))
        self.look()

    def look(self) -> None:
        """The balancers take note of who is offered."""
        self._offered = [at for at, replica in enumerate(self.replicas) if replica.is_offered]

    def arrive(self, moments: Times, tokens: Tokens) -> None:
        """Requests come at these moments, in ms."""
        lengths = tokens(self.random, len(moments)).tolist()
        balancers = self.random.integers(0, len(self._turn), len(moments)).tolist()
        self.environment.process(self._arrivals(moments.tolist(), lengths, balancers))

    def loop(self, clients: int, tokens: Tokens) -> None:
        """Clients that send their next request as soon as the last one is answered."""
        for number in range(clients):
            self.environment.process(self._client(number % len(self._turn), tokens))

    def run(self, seconds: float | None = None) -> Answers:
        """Until all is answered, or for so long."""
        self.environment.run(None if seconds is None else seconds * 1e3)
        return Answers(
            np.array(self._came), np.array(self._ms), seconds or self.environment.now / 1e3
        )

    def kill(self, at: int) -> None:
        """The replica dies; what it had is asked of others."""
        replica = self.replicas[at]
        replica.is_up = replica.is_offered = False
        self.look()
        lost = [*replica.held, *replica.queue]
        replica.held, replica.queue = [], deque()
        assert replica.process is not None  # noqa: S101 (tells the type checker)
        replica.process.interrupt()
        for request in lost:
            self._under_way[request.balancer][at] -= 1
            self._send(request)

    def revive(self, at: int) -> None:
        """It is back, and offered."""
        replica = self.replicas[at]
        replica.is_up = replica.is_offered = True
        replica.process = self.environment.process(self._serve(replica))
        self.look()

    def _hold_ms(self, texts: int, tokens: int) -> float:
        spread = self.service.spread / math.sqrt(texts)
        factor = math.exp(spread * next(self._normal) - spread**2 / 2)  # 1 on average
        return self.service.hold_ms(texts, tokens) * factor

    def _drawn(self) -> Iterator[float]:
        while True:  # many at a time: one at a time would take longer than all the rest
            yield from self.random.standard_normal(10_000).tolist()

    def _arrivals(self, moments: list[float], lengths: list[int], balancers: list[int]) -> Event:
        for moment, length, balancer in zip(moments, lengths, balancers, strict=True):
            yield self.environment.timeout(max(moment - self.environment.now, 0.0))
            if self.under_way >= self._room:
                self.refused.append(self.environment.now)
            else:
                self.under_way += 1
                self._send(Request(self.environment.now, length, balancer))

    def _client(self, balancer: int, tokens: Tokens) -> Event:
        while True:
            length = int(tokens(self.random, 1)[0])
            request = Request(self.environment.now, length, balancer)
            request.answered = self.environment.event()
            self.under_way += 1
            self._send(request)
            yield request.answered
            yield self.environment.timeout(self.service.way_ms)

    def _send(self, request: Request) -> None:
        at = self._choose(request.balancer)
        request.replica = at
        self._under_way[request.balancer][at] += 1
        replica = self.replicas[at]
        replica.queue.append(request)
        if replica.wake is not None:
            replica.wake.succeed()
            replica.wake = None

    def _serve(self, replica: Replica) -> Event:
        try:
            while replica.is_up:
                if not replica.queue:
                    replica.wake = self.environment.event()
                    yield replica.wake
                step = [replica.queue.popleft() for _ in range(min(len(replica.queue), MOST_TEXTS))]
                replica.held = step
                tokens = sum(request.tokens for request in step)
                yield self.environment.timeout(self._hold_ms(len(step), tokens))
                replica.held = []
                self._answer(step)
        except simpy.Interrupt:
            replica.wake = None

    def _answer(self, step: Iterable[Request]) -> None:
        for request in step:
            self._under_way[request.balancer][request.replica] -= 1
            self.under_way -= 1
            self._came.append(request.came)
            self._ms.append(self.environment.now - request.came + self.service.way_ms)
            if request.answered is not None:
                request.answered.succeed()

    def _next_one(self, balancer: int) -> int:
        self._turn[balancer] += 1
        return self._offered[self._turn[balancer] % len(self._offered)]

    def _any(self, balancer: int) -> int:
        return self._offered[int(self.random.random() * len(self._offered))]

    def _better_of_two(self, balancer: int) -> int:
        counts = self._under_way[balancer]
        return min(self._any(balancer), self._any(balancer), key=counts.__getitem__)

    def _least(self, balancer: int) -> int:
        counts, turn = self._under_way[balancer], self._turn[balancer]
        self._turn[balancer] += 1
        # Among equals in turn, as HAProxy does.
        first = turn % len(self._offered)
        in_turn = self._offered[first:] + self._offered[:first]
        return min(in_turn, key=counts.__getitem__)
