# SPDX-License-Identifier: Apache-2.0
"""All that `perf.sizing` found, as plain data. Nothing here was measured but what `Load` holds."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from perf.sizing_service import Load, Service


@dataclass(frozen=True)
class Check:
    """A measured load beside the same one simulated."""

    load: Load
    p50_ms: float
    p99_ms: float
    requests_s: float

    @property
    def tail(self) -> float:
        """How many times as high as simulated p99 was."""
        return self.load.p99_ms.median / self.p99_ms

    @property
    def too_fast(self) -> float:
        """How many times as fast the simulation is, by p50 or by rate."""
        measured = self.load
        return max(
            measured.p50_ms.median / self.p50_ms, self.requests_s / measured.requests_s.median
        )


@dataclass(frozen=True)
class Capacity:
    """What a replica computes at most: texts a second, and what a million texts cost.

    Attributes:
        vcpu_hours: of a million texts at `SizingResults.planned` of that rate.
    """

    dtype: str
    tokens: float
    texts_s: float
    vcpu_hours: float


@dataclass(frozen=True)
class Point:
    """A fleet under a steady load; milliseconds.

    Attributes:
        busy: the load, as a share of what all replicas compute at most.
    """

    replicas: int
    rule: str
    arrivals: str
    busy: float
    p50_ms: float
    p99_ms: float
    p999_ms: float


@dataclass(frozen=True)
class Needed:
    """The fewest replicas whose p99, `SizingResults.tail` and all, is within the target.

    `replicas` is 0 where none are enough: one request alone takes longer.
    """

    requests_s: float
    target_ms: float
    replicas: int
    busy: float
    p99_ms: float


@dataclass(frozen=True)
class Disturbed:
    """A fleet to which something happens; the quiet fleet's p99 beside it."""

    what: str
    replicas: int
    busy: float
    quiet_p99_ms: float
    p99_ms: float
    p999_ms: float
    most_ms: float


@dataclass(frozen=True)
class Step:
    """The load grows at one moment, and replicas follow.

    Attributes:
        times: the load after it, as a multiple of the load before.
        start_s: from the decision to a replica that answers.
        first_s, enough_s: until there was one more, and as many as the load takes; None: never.
        quiet_s: until requests were answered within 250 ms (p99 of a second) again; None: never.
        refused: share of the requests between the step and the end.
        p99_ms: of the minute after the step, of what was not refused.
    """

    times: float
    start_s: float
    replicas: int
    first_s: float | None
    enough_s: float | None
    quiet_s: float | None
    refused: float
    p99_ms: float


@dataclass(frozen=True)
class Spare:
    """How seldom there are fewer replicas than the load takes.

    Attributes:
        away: share of the time that one replica is away, by itself.
        short_s: seconds in a month with fewer than `needed`.
    """

    needed: int
    spare: int
    away: float
    short_s: float


@dataclass(frozen=True)
class Cached:
    """What memories answer, of texts by Zipf's law.

    Attributes:
        different: texts there are.
        entries: of each memory. count: of memories, among which requests are spread.
        early, late: share of the first tenth of the requests, and of the second half.
    """

    different: int
    entries: int
    count: int
    early: float
    late: float


@dataclass(frozen=True)
class Wire:
    """Bytes of one text and its vector on the wire, without TCP's and HTTP's own."""

    road: str
    sent: float
    answered: float


@dataclass(frozen=True)
class Memory:
    """MB (10^6 bytes) of a replica.

    Attributes:
        is_measured: else it is worked out from the model's size.
    """

    model: str
    million_weights: float
    replica_mb: float
    another_process_mb: float | None
    is_measured: bool


@dataclass(frozen=True)
class SizingResults:
    """One run.

    Attributes:
        quick: whether it was a smoke run, whose figures mean little.
        cpu, cores, revision, date: of the machine and the tree that profile.json was measured on.
        margin: by how much the simulated server is too fast at worst; what replicas are counted
            with is so much slower.
        tail: by how much the p99 of that slower server is still too low at worst; where a p99 is
            promised, it is counted as so much higher.
        planned: share of a replica's most that `vcpu_hours` and texts a day are counted at.
    """

    quick: bool
    cpu: str
    cores: int
    revision: str
    date: str
    service: Service
    checks: list[Check]
    margin: float
    tail: float
    planned: float
    capacities: list[Capacity]
    curves: list[Point]
    rules: list[Point]
    needed: list[Needed]
    disturbed: list[Disturbed]
    steps: list[Step]
    spares: list[Spare]
    cached: list[Cached]
    wires: list[Wire]
    memory: list[Memory]

    def to_json(self) -> str:
        """Everything, unrounded."""
        return json.dumps(asdict(self), indent=2) + "\n"
