# SPDX-License-Identifier: Apache-2.0
"""What a soak found, as plain data: trends with their uncertainty, and a verdict on each.

A process is replaced now and then in a soak, and a new one starts small: over all of them a leak
would not show. So a trend is that within lives: the median slope of all pairs of samples of the
same process (Theil and Sen's), once it is warm. Its uncertainty is a bootstrap's in blocks, for
samples that follow each other are alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from perf.common import MOST_OTHER_WORK, Run

Floats = npt.NDArray[np.float64]

STEADY, GROWS, SLOWER, UNCLEAR = "steady", "**grows**", "**slower**", "unclear: run longer"
SOUND, UNSOUND = "sound", "**not sound**"
MOST_DRIFT = 1.5  # of the last third's p50 to the first's
_LEAST_POINTS = 8  # of a life; a shorter one tells nothing
_LEAST_WATCHED_S = 300.0  # else noise, which is slow, is taken for growth
_MOST_POINTS = 120  # of a life; more are joined to medians
_DRAWS = 200
_HOUR_S = 3600.0


@dataclass(frozen=True)
class Life:
    """What was sampled of one process.

    Attributes:
        at_s: seconds, ascending [N].
        values: of whatever it is [N].
    """

    at_s: Floats
    values: Floats

    def warm(self, warm_up_s: float) -> Life:
        """Without its first seconds."""
        kept = self.at_s - self.at_s[:1] >= warm_up_s
        return Life(self.at_s[kept], self.values[kept])

    def cut(self, at_s: Sequence[float]) -> list[Life]:
        """The pieces between these moments; none is empty."""
        places = np.searchsorted(self.at_s, at_s)
        pieces = zip(np.split(self.at_s, places), np.split(self.values, places), strict=True)
        return [Life(seconds, values) for seconds, values in pieces if len(seconds)]

    def thinned(self) -> Life:
        """At most `_MOST_POINTS` points, the medians of neighbours."""
        if len(self.at_s) <= _MOST_POINTS:
            return self
        return Life(
            *(
                np.array([np.median(some) for some in np.array_split(every, _MOST_POINTS)])
                for every in (self.at_s, self.values)
            )
        )


@dataclass(frozen=True)
class Slope:
    """Growth in an hour, and the 95 % interval of it."""

    per_hour: float
    low: float
    high: float

    def show(self, digits: int = 1) -> str:
        """The slope, with its interval."""
        low, high = f"{self.low:+,.{digits}f}", f"{self.high:+,.{digits}f}"
        return f"{self.per_hour:+,.{digits}f} ({low} to {high})"

    def verdict(self, bound: float) -> str:
        """Whether it is surely below `bound` an hour, surely above, or neither."""
        if self.high < bound:
            return STEADY
        return GROWS if self.low > bound else UNCLEAR


@dataclass(frozen=True)
class Quantity:
    """Something that may leak.

    Attributes:
        field: of `soak_watch.Process` or `soak_watch.Moment`.
        bound: what an hour's growth has to stay below.
    """

    field: str
    title: str
    unit: str
    bound: float


# Of each process. At 60 operations a second, 30 MB an hour are 140 bytes an operation.
OF_PROCESSES = (
    Quantity("private_mb", "private memory", "MB", 30.0),
    Quantity("handles", "open handles", "", 30.0),
    Quantity("threads", "threads", "", 10.0),
)
OF_ALL = (
    Quantity("pss_mb", "memory (PSS)", "MB", 60.0),
    Quantity("shm_files", "files in /dev/shm", "", 10.0),
    Quantity("shm_mb", "bytes in /dev/shm", "MB", 10.0),
)


@dataclass(frozen=True)
class Of:
    """A quantity of all processes with that role."""

    quantity: Quantity
    role: str

    def __str__(self) -> str:
        unit = f", {self.quantity.unit}" if self.quantity.unit else ""
        return f"{self.quantity.title} of {self.role}{unit}"


@dataclass(frozen=True)
class Trend:
    """How a quantity grows under the load.

    Attributes:
        processes: how many of them there are at once.
        lives: how many lived long enough to tell.
        watched_s: how long these were watched when they were warm, together.
        first, last: medians of the first and the last tenth, of one process on average.
        slope: of one process; None if none lived long enough.
    """

    of: Of
    processes: int
    lives: int
    watched_s: float
    first: float
    last: float
    slope: Slope | None

    @property
    def verdict(self) -> str:
        if self.slope is None or self.watched_s < _LEAST_WATCHED_S:
            return UNCLEAR
        return self.slope.verdict(self.of.quantity.bound)


def trend(of: Of, lives: Sequence[Life], *, warm_up_s: float, processes: int = 1) -> Trend:
    """The trend of what was sampled of these processes."""
    warm = [life.warm(warm_up_s).thinned() for life in lives if len(life.at_s)]
    told = [life for life in warm if len(life.at_s) >= _LEAST_POINTS]
    if not told:
        seen = [float(life.values[-1]) for life in lives if len(life.at_s)]
        value = float(np.mean(seen)) if seen else 0.0
        return Trend(of, processes, 0, 0.0, value, value, None)
    tenths = [max(1, len(life.values) // 10) for life in told]
    first = [np.median(life.values[:n]) for life, n in zip(told, tenths, strict=True)]
    last = [np.median(life.values[-n:]) for life, n in zip(told, tenths, strict=True)]
    watched_s = sum(float(np.ptp(life.at_s)) for life in told)
    return Trend(
        of,
        processes,
        len(told),
        watched_s,
        float(np.mean(first)),
        float(np.mean(last)),
        slope(told),
    )


def slope(lives: Sequence[Life]) -> Slope:
    """Theil and Sen's slope within lives, by the hour; at least one life of two points."""
    rng = np.random.default_rng(0)
    pairs = [np.triu_indices(len(life.at_s), 1) for life in lives]
    apart = [life.at_s[j] - life.at_s[i] for life, (i, j) in zip(lives, pairs, strict=True)]

    def median(values: Sequence[Floats]) -> float:
        slopes = [
            (one[j] - one[i]) / span for one, (i, j), span in zip(values, pairs, apart, strict=True)
        ]
        return float(np.median(np.concatenate(slopes)))

    found = median([life.values for life in lives])
    lines = [found * life.at_s + np.median(life.values - found * life.at_s) for life in lives]
    left = [life.values - line for life, line in zip(lives, lines, strict=True)]
    drawn = [
        median([line + _blocks(rest, rng) for line, rest in zip(lines, left, strict=True)])
        for _ in range(_DRAWS)
    ]
    low, high = np.quantile(drawn, (0.025, 0.975))
    # Samples that are nearly all the same would give an interval of no width at all.
    return Slope(
        found * _HOUR_S, min(float(low), found) * _HOUR_S, max(float(high), found) * _HOUR_S
    )


def _blocks(rest: Floats, rng: np.random.Generator) -> Floats:
    """As many values, drawn in blocks of neighbours; the end joins the beginning."""
    count = len(rest)
    length = max(2, int(np.sqrt(count)))
    starts = rng.integers(0, count, -(-count // length))
    places = (starts[:, None] + np.arange(length)) % count
    drawn: Floats = rest[places.ravel()[:count]]
    return drawn


@dataclass(frozen=True)
class Rest:
    """What all processes of a role hold while nobody asks, before the load and after it.

    Attributes:
        allowed: how many more may be held after it.
    """

    of: Of
    before: float
    after: float
    allowed: float

    @property
    def verdict(self) -> str:
        return STEADY if self.after <= self.before + self.allowed else GROWS


@dataclass(frozen=True)
class Drift:
    """Latencies of one kind of request in the first and the last third of the load, in ms."""

    kind: str
    answered: int
    first_p50_ms: float
    last_p50_ms: float
    first_p99_ms: float
    last_p99_ms: float

    @property
    def ratio(self) -> float:
        """The last third's p50 to the first's."""
        return self.last_p50_ms / self.first_p50_ms

    @property
    def verdict(self) -> str:
        return STEADY if self.ratio <= MOST_DRIFT else SLOWER


@dataclass(frozen=True)
class Event:
    """What was done to the stack: a version went live, or a process was killed.

    Attributes:
        at_s: since the load began.
        took_s: until that was over: all Tritons serve the version, or are ready; None: never.
    """

    at_s: float
    kind: str
    what: str
    took_s: float | None


@dataclass(frozen=True)
class Failure:
    """Requests of one kind that failed in one way."""

    kind: str
    how: str
    count: int


@dataclass(frozen=True)
class SoakResults(Run):
    """One soak.

    Attributes:
        replicas, gateways: of the stack.
        peak: operations a second that it did at most, of the same mix.
        load_s: seconds of load.
        answered: requests that were answered as they had to be, by kind.
        vectors: how many were compared with the right ones, and were right.
        wrong: answers with vectors that were not, one each; they are among the failures.
        refused: bad requests that were refused as they had to be, by what was bad.
        hung_up: requests whose caller went away.
        failures: requests that failed.
        skipped_s: seconds of load that were left out because the machine was behind.
        trends: of each quantity and role.
        rest: what is held while nobody asks.
        left: what was still there after the stop.
        lost: why it ended early; empty if it did not.
    """

    replicas: int
    gateways: int
    peak: float
    load_s: float
    answered: dict[str, int]
    vectors: int
    wrong: list[str]
    refused: dict[str, int]
    hung_up: int
    failures: list[Failure]
    skipped_s: float
    trends: list[Trend]
    rest: list[Rest]
    drifts: list[Drift]
    events: list[Event]
    left: list[str]
    lost: str

    @property
    def is_disturbed(self) -> bool:
        """Whether others worked most of the time: an hour is never wholly undisturbed."""
        return self.other_work.median > MOST_OTHER_WORK

    @property
    def failed(self) -> int:
        """Requests that failed."""
        return sum(failure.count for failure in self.failures)

    @property
    def asked(self) -> int:
        """Requests of all kinds."""
        counts = (*self.answered.values(), *self.refused.values(), self.hung_up, self.failed)
        return sum(counts)

    @property
    def outcome(self) -> str:
        """`UNSOUND` if something failed, grows for sure, or was left; else `UNCLEAR` or `SOUND`.

        Drift counts on a quiet machine only.
        """
        found = [one.verdict for one in self.trends] + [one.verdict for one in self.rest]
        if not self.quick and not self.is_disturbed:
            found += [drift.verdict for drift in self.drifts]
        if self.failed or self.lost or self.left or {GROWS, SLOWER} & set(found):
            return UNSOUND
        return UNCLEAR if UNCLEAR in found else SOUND

    def bytes_a_request(self, found: Trend) -> tuple[float, float] | None:
        """The growth of all these processes a request of the load; and its upper end."""
        if found.slope is None or not self.asked:
            return None
        scale = found.processes * 1e6 / (self.asked / self.load_s * _HOUR_S)
        return found.slope.per_hour * scale, found.slope.high * scale
