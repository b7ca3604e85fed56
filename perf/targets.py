# SPDX-License-Identifier: Apache-2.0
"""What the original specification asks for, beside what was measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from perf.load import CACHE_ENTRIES, CONCURRENCIES, LoadResult
from perf.results import Results

Verdict = Literal["met", "not met", "not measured"]


@dataclass(frozen=True)
class Target:
    """One line of the specification, and how it stands."""

    what: str
    wanted: str
    measured: str
    verdict: Verdict


def below(what: str, limit: float, value: float | None, unit: str, digits: int = 1) -> Target:
    """A target met by staying under a limit."""
    met = value is not None and value < limit
    return _compare(what, f"< {limit:g}", value, unit, met, digits)


def above(what: str, limit: float, value: float | None, unit: str, digits: int = 0) -> Target:
    """A target met by exceeding a limit."""
    met = value is not None and value > limit
    return _compare(what, f"> {limit:,g}", value, unit, met, digits)


def targets(results: Results) -> list[Target]:
    """Every target that can be measured, in the specification's order."""
    single, hit = results.server.load("12_miss"), results.server.load("hit_1")
    batch = results.server.load("32x16_miss")
    misses = [results.server.load(f"mixed_{n}") for n in CONCURRENCIES]
    hits = [results.server.load(f"hit_{n}") for n in CONCURRENCIES]
    cold, cache = results.cold_start, results.server.cache
    sts = results.sts.served if results.sts else None
    full = cache.entries >= CACHE_ENTRIES
    return [
        below("start, process to first embedding", 100, cold.first_answer_s.median * 1e3, "ms", 0),
        below("first inference once ready", 50, cold.first_inference_ms.median, "ms"),
        below("one short text, p50, new text", 5, _p50(single), "ms", 2),
        below("one short text, p50, cached", 5, _p50(hit), "ms", 2),
        below("one short text, p99, new text", 15, _p99(single), "ms", 2),
        below("one short text, p99, cached", 15, _p99(hit), "ms", 2),
        below("batch of 32 short texts, p50, new", 20, _p50(batch), "ms"),
        above("requests a second, new texts of 5-60 words", 2000, _best(misses), "req/s"),
        above("requests a second, one cached text", 2000, _best(hits), "req/s"),
        below("memory of all processes after load, PSS", 200, _pss(results), "MB", 0),
        below("weight file mapped and checked", 50, results.weights.open_ms.median, "ms"),
        _compare(
            "weight file smaller than the checkpoint",
            "30-40",
            results.weights.smaller_percent,
            "%",
            results.weights.smaller_percent >= 30,
            1,
        ),
        above("semantic accuracy, STS Spearman x 100", 90, sts, "", 2),
        Target(
            "texts held by the response cache",
            f"{CACHE_ENTRIES:,}",
            f"{cache.held:,} of {cache.entries:,} sent",
            ("met" if cache.held >= CACHE_ENTRIES else "not met") if full else "not measured",
        ),
    ]


def _p50(load: LoadResult | None) -> float | None:
    return load.p50_ms.median if load else None


def _p99(load: LoadResult | None) -> float | None:
    return load.p99_ms.median if load else None


def _best(loads: list[LoadResult | None]) -> float | None:
    return max((load.requests_s.median for load in loads if load), default=None)


def _pss(results: Results) -> float:
    return sum(process.pss_mb for process in results.server.loaded)


def _compare(
    what: str, wanted: str, value: float | None, unit: str, met: bool, digits: int
) -> Target:
    wanted = f"{wanted} {unit}".strip()
    if value is None:
        return Target(what, wanted, "-", "not measured")
    measured = f"{value:,.{digits}f} {unit}".strip()
    return Target(what, wanted, measured, "met" if met else "not met")
