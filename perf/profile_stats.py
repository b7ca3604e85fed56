# SPDX-License-Identifier: Apache-2.0
"""What Triton counts by itself: statistics of its models, and Prometheus metrics."""

from __future__ import annotations

import http.client
import re
from dataclasses import dataclass, fields
from typing import Any

from arrowhead_server.address import Address
from perf.server import Served

_METRIC = re.compile(r"^(\w+)(?:\{([^}]*)\})?\s+(\S+)$")
_LABEL = re.compile(r'(\w+)="([^"]*)"')


@dataclass(frozen=True)
class Counts:
    """One model's counters, all versions together; times in nanoseconds, summed over requests.

    A request in a batch counts the whole batch's time as its own.

    Attributes:
        requests, total_ns: answered ones, and how long they took altogether.
        timed: requests that were computed, which the four stages are the sum of.
        texts, executions: what was computed, and in how many batches.
        hits, misses: of the response cache.
    """

    requests: int = 0
    total_ns: int = 0
    timed: int = 0
    queue_ns: int = 0
    input_ns: int = 0
    infer_ns: int = 0
    output_ns: int = 0
    texts: int = 0
    executions: int = 0
    hits: int = 0
    misses: int = 0

    def since(self, before: Counts) -> Counts:
        """What was added since `before`."""
        return Counts(*(getattr(self, f.name) - getattr(before, f.name) for f in fields(self)))

    def plus(self, other: Counts) -> Counts:
        """Both together."""
        return Counts(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def batch(self) -> float:
        """The mean number of texts in a batch."""
        return self.texts / max(self.executions, 1)

    @property
    def hit_rate(self) -> float:
        """The share of requests that the cache answered."""
        return self.hits / max(self.hits + self.misses, 1)

    def us(self, stage: str) -> float:
        """Microseconds of a request, on average: "total", "queue", "input", "infer", "output"."""
        requests = self.requests if stage == "total" else self.timed
        return float(getattr(self, f"{stage}_ns")) / max(requests, 1) / 1e3


def parse_statistics(statistics: Any) -> dict[str, Counts]:
    """Reads Triton's answer to /v2/models/stats, by model."""
    found: dict[str, Counts] = {}
    for model in statistics["model_stats"]:
        raw = model["inference_stats"]
        one = Counts(
            requests=int(raw["success"]["count"]),
            total_ns=int(raw["success"]["ns"]),
            timed=int(raw["compute_infer"]["count"]),
            queue_ns=int(raw["queue"]["ns"]),
            input_ns=int(raw["compute_input"]["ns"]),
            infer_ns=int(raw["compute_infer"]["ns"]),
            output_ns=int(raw["compute_output"]["ns"]),
            texts=int(model["inference_count"]),
            executions=int(model["execution_count"]),
            hits=int(raw["cache_hit"]["count"]),
            misses=int(raw["cache_miss"]["count"]),
        )
        # Of every version that is loaded; counters add up.
        found[model["name"]] = found.get(model["name"], Counts()).plus(one)
    return found


def statistics(server: Served) -> dict[str, Counts]:
    """All counters of a running server, now."""
    return parse_statistics(server.get("/v2/models/stats"))


def parse_metrics(text: str) -> dict[tuple[str, str], float]:
    """Reads Prometheus' text format: metric and model ("" where it names none) -> sum over labels.

    >>> parse_metrics('nv_x{model="a",version="1"} 2')
    {('nv_x', 'a'): 2.0}
    """
    found: dict[tuple[str, str], float] = {}
    for line in text.splitlines():
        if match := _METRIC.match(line):
            name, labels, value = match.groups()
            key = name, dict(_LABEL.findall(labels or "")).get("model", "")
            found[key] = found.get(key, 0.0) + float(value)
    return found


def metrics(address: Address) -> dict[tuple[str, str], float]:
    """The metrics of a running server, now."""
    # One connection a request: an idle open one would hold up Triton's exit.
    connection = http.client.HTTPConnection(address.host, address.metrics_port, timeout=10)
    try:
        connection.request("GET", "/metrics", headers={"Connection": "close"})
        return parse_metrics(connection.getresponse().read().decode())
    finally:
        connection.close()
