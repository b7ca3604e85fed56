# SPDX-License-Identifier: Apache-2.0
"""What Prometheus reads. No label has a value that a caller chooses."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.registry import Collector

from arrowhead_server.gateway.asking import Asking

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
        self.triton = Histogram(
            "arrowhead_gateway_triton_seconds",
            "Of a request to Triton for vectors, by how it ended",
            ["outcome"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        ProcessCollector(registry=self.registry)
        self.refused = Counter(
            "arrowhead_gateway_refused",
            "Requests that were not answered as they wished, by reason",
            ["reason"],
            registry=self.registry,
        )

    def asked(self, outcome: str, seconds: float) -> None:
        """Takes note of a request to Triton."""
        self.triton.labels(outcome).observe(seconds)

    def watch(self, asking: Asking) -> None:
        """Tells the counts of its texts."""
        self.registry.register(_Texts(asking))


class _Texts(Collector):
    """Counts, read when Prometheus asks."""

    def __init__(self, asking: Asking) -> None:
        self._asking = asking

    def collect(self) -> Iterator[Metric]:
        counts = self._asking.counts
        texts = CounterMetricFamily(
            "arrowhead_gateway_texts",
            "Texts: remembered (hit), asked for by another request already (merged), or new (miss)",
            labels=["how"],
        )
        texts.add_metric(["hit"], counts.hits)
        texts.add_metric(["merged"], counts.merged)
        texts.add_metric(["miss"], counts.misses)
        yield texts
        for name, told, number in (
            ("tokens", "Tokens of texts that were answered", counts.tokens),
            ("truncated_texts", "Answered texts not read to their end", counts.truncated),
            ("triton_tokens", "Tokens that Triton was sent", counts.sent_tokens),
            ("model_swaps", "Times that another version took over", self._asking.swaps),
        ):
            yield CounterMetricFamily(f"arrowhead_gateway_{name}", told, number)
        served = InfoMetricFamily("arrowhead_gateway_model", "The version that is asked now")
        if (info := self._asking.live) is not None:
            labels = {
                "model": info.name,
                "version": str(info.version),
                "fingerprint": info.fingerprint,
            }
            served.add_metric([], labels)
        yield served
        entries = "Texts remembered"
        yield GaugeMetricFamily("arrowhead_gateway_entries", entries, self._asking.remembered)
        waiting = GaugeMetricFamily(
            "arrowhead_gateway_waiting_texts",
            "Texts that wait for their turn at Triton: of short requests, and of long lists",
            labels=["lane"],
        )
        for lane, number in self._asking.waiting.items():
            waiting.add_metric([lane], number)
        yield waiting
