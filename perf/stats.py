# SPDX-License-Identifier: Apache-2.0
"""Medians, spreads, and timing in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Vectors = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Sample:
    """Repeated measurements of one thing, in whatever unit the owner says."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Sample:
        """The median and the extremes of at least one value."""
        return cls(statistics.median(values), min(values), max(values), len(values))

    def show(self, digits: int = 2) -> str:
        """The median, with the extremes if there was more than one measurement."""
        if self.count == 1:
            return f"{self.median:,.{digits}f}"
        return f"{self.median:,.{digits}f} ({self.low:,.{digits}f}-{self.high:,.{digits}f})"


def elapsed_ms(call: Callable[[], object]) -> float:
    """Milliseconds that one call takes."""
    began = time.perf_counter()
    call()
    return (time.perf_counter() - began) * 1e3


def interleaved_ms(
    calls: dict[str, Callable[[], object]],
    *,
    rounds: int,
    slice_ms: float = 0.0,
    limit_s: float = 60.0,
) -> dict[str, list[float]]:
    """Milliseconds of each call, by name: all take turns, so that drift touches all alike.

    Args:
        calls: what to time; each is called twice beforehand.
        rounds: how often each gets its turn.
        slice_ms: a turn repeats a call until about so many milliseconds are spent; once at least.
        limit_s: no round begins after so many seconds, except the first.
    """
    repeats = {}
    for name, call in calls.items():
        call()
        repeats[name] = max(1, int(slice_ms / max(elapsed_ms(call), 1e-3)))
    taken: dict[str, list[float]] = {name: [] for name in calls}
    began = time.monotonic()
    for number in range(rounds):
        if number and time.monotonic() - began > limit_s:
            break
        for name, call in calls.items():
            taken[name] += [elapsed_ms(call) for _ in range(repeats[name])]
    return taken
