# SPDX-License-Identifier: Apache-2.0
"""What Prometheus reads of the server itself. Triton's own metrics have a port of their own."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Metric, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    InfoMetricFamily,
    StateSetMetricFamily,
)
from prometheus_client.registry import Collector

from arrowhead_server.health import Condition, Watched


def page(watched: Watched) -> tuple[int, str, bytes]:
    """Status, content type and body."""
    registry = CollectorRegistry()
    registry.register(_State(watched))
    return 200, CONTENT_TYPE_LATEST, generate_latest(registry)


class _State(Collector):
    """What Prometheus is told, as it is when it asks."""

    def __init__(self, watched: Watched) -> None:
        self._watched = watched

    def collect(self) -> Iterator[Metric]:
        condition, _ = self._watched.condition()
        yield StateSetMetricFamily(
            "arrowhead_server_state",
            "What the server is doing",
            {each.value: each is condition for each in Condition},
        )
        restarts = "Times that Triton was started anew because it or a model died or hung"
        yield CounterMetricFamily(
            "arrowhead_server_restarts", restarts, self._watched.restart_count
        )
        seconds = "Seconds from noticing that to an answer of every model, all restarts together"
        yield CounterMetricFamily(
            "arrowhead_server_recovery_seconds", seconds, self._watched.recovery_s
        )
        served = InfoMetricFamily("arrowhead_server_model", "Served now", labels=["model"])
        for model in self._watched.models:
            served.add_metric(
                [model.name], {"version": str(model.version), "dimension": str(model.dimension)}
            )
        yield served
        yield GaugeMetricFamily(
            "arrowhead_server_models", "How many are served", len(self._watched.models)
        )
