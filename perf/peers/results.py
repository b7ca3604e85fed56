# SPDX-License-Identifier: Apache-2.0
"""All that a run beside the peers found, as plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from perf.common import Run
from perf.quality import Closeness
from perf.stats import Sample

if TYPE_CHECKING:  # imports torch, which must wait until the servers were measured
    from perf.engine import EngineResults


@dataclass(frozen=True)
class Loaded:
    """A load on a server, over all passes.

    Attributes:
        p50_ms, p99_ms: latencies as the client sees them.
        requests_s: answered in a second.
        requests: that were measured, in all passes together.
    """

    key: str
    title: str
    clients: int
    p50_ms: Sample
    p99_ms: Sample
    requests_s: Sample
    requests: int


@dataclass(frozen=True)
class ServerResult:
    """One server, over one of its protocols.

    Attributes:
        key, title: its name in the results, and for people.
        ours: whether it is Arrowhead.
        start_s: from the start of its process to the first vector; files in the page cache.
        pss_mb: memory of all its processes after all loads, while no other server runs.
        closeness: to sentence-transformers in float32; None for a second protocol.
        sts: Spearman x 100 of sentence pairs, if there were any.
    """

    key: str
    title: str
    ours: bool
    start_s: Sample
    pss_mb: Sample
    loads: list[Loaded]
    closeness: Closeness | None
    sts: float | None

    def load(self, key: str) -> Loaded | None:
        """The result of a load, if there is one."""
        return next((load for load in self.loads if load.key == key), None)


@dataclass(frozen=True)
class InProcess:
    """An engine without a server: milliseconds of a call with so many texts x tokens."""

    key: str
    title: str
    ms: dict[str, Sample]


@dataclass(frozen=True)
class PeerResults(Run):
    """One run of `python -m perf.peers`.

    Attributes:
        passes, load_s: how often each server was started and measured, and seconds of each load.
        against: key of the server that the others are compared with.
        notes: what each server does to be fast, by title.
        versions: what is installed, by environment.
        missing: what could not be measured, and why.
        sts_pairs: how many there were; 0 if none were given.
        engine: our engine and the machine's own rate, for the roofline.
    """

    passes: int
    load_s: float
    against: str
    servers: list[ServerResult]
    in_process: list[InProcess]
    notes: dict[str, str]
    versions: dict[str, dict[str, str]]
    missing: dict[str, str]
    sts_pairs: int
    engine: EngineResults | None

    @property
    def us(self) -> ServerResult | None:
        """The server that the others are compared with."""
        return next((server for server in self.servers if server.key == self.against), None)
