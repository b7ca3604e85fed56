# SPDX-License-Identifier: Apache-2.0
"""All that a run of `perf.gateway` found, as plain data."""

from __future__ import annotations

from dataclasses import dataclass

from perf.common import Run
from perf.stats import Sample

TOKENS = 12  # of a text
CALLERS = (1, 8, 32)
TARGET_MS = 1.5  # what `/embed` may add to gRPC's p50 for a caller alone


@dataclass(frozen=True)
class Loaded:
    """One way at so many callers, each with one request of one text under way.

    Attributes:
        key, way: of the way, for programs and for people.
        over_ms: how much longer its p50 is than `AsyncClient`'s of the same pass; None of that.
    """

    key: str
    way: str
    callers: int
    p50_ms: Sample
    p99_ms: Sample
    requests_s: Sample
    over_ms: Sample | None


@dataclass(frozen=True)
class Batch:
    """Requests of many texts of which all but one had been asked for before.

    Attributes:
        asked: texts a request that the encoder is asked for.
    """

    key: str
    way: str
    ms: Sample
    asked: float


@dataclass(frozen=True)
class Same:
    """A new text that many ask for at once.

    Attributes:
        ms: of each request.
        asked: how often the encoder is asked for it.
    """

    key: str
    way: str
    ms: Sample
    asked: float


@dataclass(frozen=True)
class Again:
    """Texts that come again by Zipf's law, to a memory that knows none of them.

    Attributes:
        possible: share of the requests whose text had been sent before.
        hit: share that was answered from memory: the gateway's, else Triton's response cache.
        merged: share that joined one under way; None where there is no such thing.
    """

    key: str
    way: str
    requests: int
    requests_s: float
    p50_ms: float
    p99_ms: float
    possible: float
    hit: float
    merged: float | None


@dataclass(frozen=True)
class Outset:
    """An application in front of a running Triton.

    Attributes:
        start_s: from the start of its process to its first vector.
        idle_mb, loaded_mb: PSS after that, and after all loads.
    """

    title: str
    start_s: Sample
    idle_mb: Sample
    loaded_mb: float


@dataclass(frozen=True)
class GatewayResults(Run):
    """One run.

    Attributes:
        triton: its version.
        loads, known: new texts, and one known text.
    """

    triton: str
    loads: list[Loaded]
    known: list[Loaded]
    batches: list[Batch]
    same: list[Same]
    again: list[Again]
    outsets: list[Outset]

    def one(self, key: str, callers: int) -> Loaded:
        """A way's new texts at so many callers."""
        return next(one for one in self.loads if (one.key, one.callers) == (key, callers))
