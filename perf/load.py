# SPDX-License-Identifier: Apache-2.0
"""perf_analyzer's loads on a running server: texts it never met, and one that its cache holds."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from perf.perf_analyzer import Measured, PerfAnalyzer, PerfAnalyzerFailed, Protocol
from perf.server import MODEL, CacheCounts, Served
from perf.stats import Sample
from perf.texts import Texts, mixed, of_tokens

CONCURRENCIES = (1, 8, 32, 64)
_PORTION = 250  # texts between two looks at the clock
CACHE_ENTRIES = 10_000  # what the specification asks the cache to hold


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
        hits, misses: requests of either kind, as Triton's own statistics counted them.
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
    hits: int
    misses: int

    @property
    def is_clean(self) -> bool:
        """Whether the cache did what the profile is about: all hits, or none."""
        return (self.misses if self.cached else self.hits) == 0


@dataclass(frozen=True)
class Run:
    """One run of perf_analyzer, and what Triton's cache counted meanwhile."""

    measured: Measured
    counts: CacheCounts


@dataclass(frozen=True)
class CacheFill:
    """So many different texts went in one by one; so many were answered when all came again."""

    entries: int
    held: int


class Load:
    """Runs profiles against one server. Its texts are distinct over its whole life.

    Attributes:
        failures: what could not be measured and why, a line each.
    """

    def __init__(self, program: PerfAnalyzer, server: Served, *, seconds: float) -> None:
        self.failures: list[str] = []
        self._program = program
        self._server = server
        self._seconds = seconds
        self._texts = Texts()
        self._p50_ms: dict[str, float] = {}  # by profile

    def passes(
        self,
        chosen: list[Profile],
        count: int,
        say: Callable[[str], None],
        between: Callable[[], None],
    ) -> list[LoadResult]:
        """Runs every profile once a pass; one that fails is left out from then on.

        `between` is called before each pass, while nothing is sent. A short run of each profile
        comes first: it warms the server, and tells how long the windows must be and how many texts
        they take.
        """
        runs: dict[str, list[Run]] = {profile.key: [] for profile in chosen}
        failed: set[str] = set()
        for number in range(count + 1):
            between()
            for profile in chosen:
                if profile.key in failed:
                    continue
                say(f"load, pass {number} of {count}: {profile.key}")
                try:
                    run = self._run(profile)
                except PerfAnalyzerFailed as error:
                    failed.add(profile.key)
                    self.failures.append(f"{profile.key}: {error}")
                    say(self.failures[-1])
                    continue
                self._p50_ms[profile.key] = run.measured.p50_ms
                if number:
                    runs[profile.key].append(run)
        return [_result(profile, runs[profile.key]) for profile in chosen if runs[profile.key]]

    def _run(self, profile: Profile) -> Run:
        p50_ms = self._p50_ms.get(profile.key)
        if p50_ms is None:
            requests = 10 if profile.batch > 1 else max(50, 2 * profile.concurrency)
            return self._send(profile, texts=2 * requests * profile.batch, requests=requests)
        window_ms = window_for(p50_ms, self._seconds)
        texts = texts_for(profile, p50_ms, window_ms)
        try:
            return self._send(profile, texts=texts, window_ms=window_ms)
        except PerfAnalyzerFailed:  # a window without an answer, if the machine was held up
            return self._send(profile, texts=2 * texts, window_ms=2 * window_ms)

    def _send(self, profile: Profile, *, texts: int, **extent: int) -> Run:
        if profile.cached:
            sent = [profile.make(Texts(seed=7))] * profile.batch
            with self._server.client(batch_size=profile.batch) as client:
                client.embed(sent)  # the loads before may have pushed it out of the cache
        else:
            sent = [profile.make(self._texts) for _ in range(texts)]
        address = self._server.address
        port = address.grpc_port if profile.protocol == "grpc" else address.http_port
        before = self._server.cache_counts()
        measured = self._program.measure(
            MODEL,
            f"{address.host}:{port}",
            sent,
            concurrency=profile.concurrency,
            batch=profile.batch,
            protocol=profile.protocol,
            **extent,
        )
        return Run(measured, self._server.cache_counts().since(before))


def window_for(p50_ms: float, seconds: float) -> int:
    """How long, in ms, each of the three windows of a run must be, to see ten requests at least."""
    return int(max(seconds * 1e3 / 3, 10 * p50_ms))


def texts_for(profile: Profile, p50_ms: float, window_ms: int) -> int:
    """How many texts suffice for a run in which none may come twice.

    Four times what three windows take: perf_analyzer goes on between windows, its threads walk
    through the texts each at its own speed, and the median may have been taken in a slow moment.
    """
    return int(4 * 3 * window_ms / p50_ms + 10) * profile.concurrency * profile.batch


def fill_cache(server: Served, entries: int, *, limit_s: float) -> CacheFill:
    """Sends so many different short texts, then the same again, and counts the hits.

    After `limit_s` seconds no further new ones are sent.
    """
    source = Texts(seed=11)
    texts: list[str] = []
    with server.client(batch_size=1, concurrency=32) as client:
        began = time.monotonic()
        while len(texts) < entries and time.monotonic() - began < limit_s:
            new = [source.of_words(4) for _ in range(min(_PORTION, entries - len(texts)))]
            client.embed(new, progress=False)
            texts += new
        before = server.cache_counts()
        client.embed(texts, progress=False)
        return CacheFill(len(texts), server.cache_counts().since(before).hits)


def _result(profile: Profile, runs: list[Run]) -> LoadResult:
    measured = [run.measured for run in runs]
    hits, misses = sum(run.counts.hits for run in runs), sum(run.counts.misses for run in runs)
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
        hits=hits,
        misses=misses,
    )
