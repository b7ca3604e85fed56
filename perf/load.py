# SPDX-License-Identifier: Apache-2.0
"""perf_analyzer's loads on a running server: texts it never met, and one that its cache holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from perf.perf_analyzer import Measured, PerfAnalyzer, Protocol
from perf.server import MODEL, CacheCounts, Served
from perf.stats import Sample
from perf.texts import Texts, mixed, of_tokens

CONCURRENCIES = (1, 8, 32, 64)
CACHE_ENTRIES = 10_000  # what the specification asks the cache to hold
_MOST_REQUESTS = 30_000


@dataclass(frozen=True)
class Profile:
    """One kind of load.

    Attributes:
        key: its name in the results.
        title: what a request holds, for people.
        make: makes a text.
        cached: all requests are the same one, which the cache holds; else no text comes twice.
        batch: texts in a request.
        concurrency: requests in flight at once.
    """

    key: str
    title: str
    make: Callable[[Texts], str]
    cached: bool
    batch: int = 1
    concurrency: int = 1
    protocol: Protocol = "grpc"


def profiles() -> list[Profile]:
    """All loads; report, targets and plots know them by their keys."""
    short, batched = of_tokens(12), of_tokens(16)
    single = "one text of 12 tokens"
    batch = "32 texts of 16 tokens"
    return [
        Profile("12_miss", single, short, cached=False),
        Profile("12_miss_http", single, short, cached=False, protocol="http"),
        Profile("32x16_miss", batch, batched, cached=False, batch=32),
        Profile("32x16_hit", batch, batched, cached=True, batch=32),
        *(
            Profile(f"mixed_{n}", "one text of 5-60 words", mixed, cached=False, concurrency=n)
            for n in CONCURRENCIES
        ),
        *(Profile(f"hit_{n}", single, short, cached=True, concurrency=n) for n in CONCURRENCIES),
    ]


@dataclass(frozen=True)
class LoadResult:
    """What came of a profile, over all passes.

    Attributes:
        p50_ms, p90_ms, p99_ms: latencies of requests as the caller sees them, in milliseconds.
        requests_s: requests answered in a second.
        requests: sent in all.
        hits, misses: what Triton's own statistics counted meanwhile.
    """

    key: str
    title: str
    protocol: Protocol
    batch: int
    concurrency: int
    cached: bool
    p50_ms: Sample
    p90_ms: Sample
    p99_ms: Sample
    requests_s: Sample
    requests: int
    hits: int
    misses: int

    @property
    def is_clean(self) -> bool:
        """Whether the cache did what the profile is about: all hits, or none."""
        return (self.misses if self.cached else self.hits) == 0


@dataclass(frozen=True)
class CacheFill:
    """`entries` different texts sent one by one, then all of them again."""

    entries: int
    held: int


class Load:
    """Runs profiles against one server. Its texts are distinct over its whole life."""

    def __init__(self, program: PerfAnalyzer, server: Served, *, seconds: float) -> None:
        self._program = program
        self._server = server
        self._seconds = seconds
        self._texts = Texts()
        self._rates: dict[str, float] = {}  # requests a second, by profile

    def passes(
        self, chosen: list[Profile], count: int, say: Callable[[str], None]
    ) -> list[LoadResult]:
        """Runs every profile once a pass.

        A short run of each comes first: it warms the server and tells how many requests fill the
        seconds that a run may take.

        Raises:
            PerfAnalyzerFailed: a request failed.
        """
        runs: dict[str, list[tuple[Measured, CacheCounts, int]]] = {p.key: [] for p in chosen}
        for number in range(count + 1):
            for profile in chosen:
                say(f"load, pass {number} of {count}: {profile.key}")
                run = self._run(profile)
                if number:
                    runs[profile.key].append(run)
        return [_result(profile, runs[profile.key]) for profile in chosen]

    def _run(self, profile: Profile) -> tuple[Measured, CacheCounts, int]:
        requests = request_count(profile, self._rates.get(profile.key), self._seconds)
        if profile.cached:
            texts = [profile.make(Texts(seed=7))] * profile.batch
            with self._server.client(batch_size=profile.batch) as client:
                client.embed(texts)  # the loads before may have pushed it out of the cache
        else:
            # Twice as many as are sent: perf_analyzer's threads walk through the texts at their
            # own speeds, and a fast one must not come to texts that it has already sent.
            texts = [profile.make(self._texts) for _ in range(2 * requests * profile.batch)]
        address = self._server.address
        port = address.grpc_port if profile.protocol == "grpc" else address.http_port
        before = self._server.cache_counts()
        measured = self._program.measure(
            MODEL,
            f"{address.host}:{port}",
            texts,
            requests=requests,
            concurrency=profile.concurrency,
            batch=profile.batch,
            protocol=profile.protocol,
        )
        counted = self._server.cache_counts().since(before)
        self._rates[profile.key] = measured.requests_s
        return measured, counted, requests


def request_count(profile: Profile, rate: float | None, seconds: float) -> int:
    """How many requests fill so many seconds at that rate (requests a second), within reason."""
    least = 20 if profile.batch > 1 else max(100, 4 * profile.concurrency)
    if rate is None:
        return least
    return min(max(least, int(rate * seconds)), _MOST_REQUESTS)


def fill_cache(server: Served, entries: int) -> CacheFill:
    """Sends so many different short texts, then the same again, and counts the hits."""
    source = Texts(seed=11)
    texts = [source.of_words(4) for _ in range(entries)]
    with server.client(batch_size=1, concurrency=32) as client:
        client.embed(texts, progress=False)
        before = server.cache_counts()
        client.embed(texts, progress=False)
        return CacheFill(entries, server.cache_counts().since(before).hits)


def _result(profile: Profile, runs: list[tuple[Measured, CacheCounts, int]]) -> LoadResult:
    measured = [run[0] for run in runs]
    return LoadResult(
        profile.key,
        profile.title,
        profile.protocol,
        profile.batch,
        profile.concurrency,
        profile.cached,
        p50_ms=Sample.of([one.p50_ms for one in measured]),
        p90_ms=Sample.of([one.p90_ms for one in measured]),
        p99_ms=Sample.of([one.p99_ms for one in measured]),
        requests_s=Sample.of([one.requests_s for one in measured]),
        requests=sum(run[2] for run in runs),
        hits=sum(run[1].hits for run in runs),
        misses=sum(run[1].misses for run in runs),
    )
