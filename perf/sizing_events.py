# SPDX-License-Identifier: Apache-2.0
"""What happens to a fleet beside requests: replicas die, are replaced, come with the load."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from perf.sizing_fleet import Event, Fleet

ROOM = 384  # HAProxy lets 64 in at each of two gateways, and has 64 wait; there are two (deploy/)
# deploy/kubernetes/components/autoscaling, which a test compares with this.
THRESHOLD = 16.0  # requests under way, for each replica
POLL_S = 15.0  # both Prometheus' and KEDA's
MEAN_S = 60.0  # what is asked for is the mean of so long
GROWTH = 2.0  # at most so many times as many replicas, at one look
TOLERANCE = 0.1  # Kubernetes' own: so near to the threshold nothing is changed


def deaths(fleet: Fleet, first_s: float, every_s: float, away_s: float) -> Event:
    """A replica dies now and then, another one each time, and is back after `away_s`."""
    environment = fleet.environment
    yield environment.timeout(first_s * 1e3)
    at = 0
    while True:
        fleet.kill(at)
        yield environment.timeout(away_s * 1e3)
        fleet.revive(at)
        at = (at + 1) % len(fleet.replicas)
        yield environment.timeout((every_s - away_s) * 1e3)


def rolling(fleet: Fleet, first_s: float, away_s: float) -> Event:
    """Each replica in turn gets nothing new for `away_s`: it drains, stops, and starts again."""
    environment = fleet.environment
    yield environment.timeout(first_s * 1e3)
    for replica in list(fleet.replicas):
        replica.is_offered = False
        fleet.look()
        yield environment.timeout(away_s * 1e3)
        replica.is_offered = True
        fleet.look()


@dataclass
class Scaler:
    """KEDA's loop: looks, means, adds. Nothing is taken away here; that takes five minutes.

    Attributes:
        start_s: from the decision to a replica that answers.
        sizes: (seconds, replicas) whenever there were more.
    """

    fleet: Fleet
    start_s: float
    most: int
    sizes: list[tuple[float, int]]

    def run(self) -> Event:
        """The process."""
        environment = self.fleet.environment
        seen: deque[int] = deque(maxlen=round(MEAN_S / POLL_S))
        wanted = len(self.fleet.replicas)
        while True:
            yield environment.timeout(POLL_S * 1e3)
            seen.append(self.fleet.under_way)
            for _ in self._more(sum(seen) / len(seen), wanted):
                wanted += 1
                environment.process(self._start())

    def _more(self, under_way: float, wanted: int) -> Iterator[int]:
        share = under_way / (THRESHOLD * wanted)
        if share <= 1 + TOLERANCE:
            return iter(())
        asked = min(math.ceil(under_way / THRESHOLD), int(wanted * GROWTH), self.most)
        return iter(range(wanted, asked))

    def _start(self) -> Event:
        yield self.fleet.environment.timeout(self.start_s * 1e3)
        self.fleet.add()
        self.sizes.append((self.fleet.environment.now / 1e3, len(self.fleet.replicas)))
