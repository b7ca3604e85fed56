# SPDX-License-Identifier: Apache-2.0
"""All that a run of `perf.profile` found, as plain data."""

from __future__ import annotations

from dataclasses import dataclass

from perf.common import Run
from perf.profile_server import Instances, Line, Repeated
from perf.profile_time import TimeResults
from perf.scaling import ScalingResults


@dataclass(frozen=True)
class ProfileResults(Run):
    """One run. Parts that were not asked for are None or empty.

    Attributes:
        dtype, engine: what the server computed in.
        triton: its version.
    """

    triton: str
    engine: str
    time: TimeResults | None
    scaling: ScalingResults | None
    line: list[Line]
    repeated: Repeated | None
    instances: list[Instances]
