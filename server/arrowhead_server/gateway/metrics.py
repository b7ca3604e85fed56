# SPDX-License-Identifier: Apache-2.0
"""What Prometheus reads. No label has a value that a caller chooses."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from arrowhead_server.gateway.embedder import Embedder
from arrowhead_server.gateway.slots import Slots

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)


class Metrics:
    """A gateway's counts."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.seconds = Histogram(
            "arrowhead_gateway_request_seconds",
            "From a request's first byte to its answer's last",
            ["path", "status"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.in_flight = Gauge(
            "arrowhead_gateway_in_flight", "Requests under way", registry=self.registry
        )
        self.memory = Gauge(
            "arrowhead_gateway_memory_bytes",
            "Memory that requests under way are taken to need",
            registry=self.registry,
        )
        self.refused = Counter(
            "arrowhead_gateway_refused",
            "Requests that were not answered as they wished, by reason",
            ["reason"],
            registry=self.registry,
        )

    def watch(self, embedder: Embedder, slots: Slots) -> None:
        """Tells the counts of these, too."""
        self.registry.register(_Texts(embedder))
        self.registry.register(_Lines(slots))


class _Texts(Collector):
    """An embedder's counts, read when Prometheus asks."""

    def __init__(self, embedder: Embedder) -> None:
        self._embedder = embedder

    def collect(self) -> Iterator[Metric]:
        counts = self._embedder.counts
        texts = CounterMetricFamily(
            "arrowhead_gateway_texts",
            "Texts: remembered (hit), asked for by another request already (merged), or new (miss)",
            labels=["how"],
        )
        texts.add_metric(["hit"], counts.hits)
        texts.add_metric(["merged"], counts.merged)
        texts.add_metric(["miss"], counts.misses)
        yield texts
        entries = "Texts remembered"
        yield GaugeMetricFamily("arrowhead_gateway_entries", entries, len(self._embedder))


class _Lines(Collector):
    """Who waits for a turn at Triton."""

    def __init__(self, slots: Slots) -> None:
        self._slots = slots

    def collect(self) -> Iterator[Metric]:
        waiting = GaugeMetricFamily(
            "arrowhead_gateway_waiting",
            "Waiting for Triton: requests of few texts, and parts of long lists",
            labels=["line"],
        )
        for line, number in self._slots.waiting().items():
            waiting.add_metric([line], number)
        yield waiting
