# SPDX-License-Identifier: Apache-2.0
"""All that a run of `perf.profile` found, as plain data."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from perf.machine import Machine
from perf.profile_server import Instances, Line, Repeated
from perf.profile_time import TimeResults
from perf.scaling import ScalingResults
from perf.stats import Sample

MOST_OTHER_WORK = 15.0  # percent of all cores


@dataclass(frozen=True)
class ProfileResults:
    """One run. Parts that were not asked for are None or empty.

    Attributes:
        quick: whether it was a smoke run, whose figures mean little.
        seconds: how long it took.
        other_work: percent of the cores that others used, looked at between measurements.
        dtype, engine: what the server computed in.
        triton: its version.
    """

    machine: Machine
    quick: bool
    seconds: float
    other_work: Sample
    triton: str
    engine: str
    time: TimeResults | None
    scaling: ScalingResults | None
    line: list[Line]
    repeated: Repeated | None
    instances: list[Instances]

    @property
    def is_disturbed(self) -> bool:
        """Whether others worked on the machine so much that the figures are not the server's."""
        return self.other_work.high > MOST_OTHER_WORK

    def to_json(self) -> str:
        """Everything, medians unrounded."""
        return json.dumps(asdict(self), indent=2) + "\n"
