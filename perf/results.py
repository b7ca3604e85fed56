# SPDX-License-Identifier: Apache-2.0
"""All that a run found, as plain data."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from perf.common import Run
from perf.load import CacheFill, LoadResult
from perf.quality import Closeness, StsResult
from perf.server import ColdStart, ProcessMemory

if TYPE_CHECKING:  # these two import torch, which must wait until the server was measured
    from perf.engine import EngineResults
    from perf.weights import WeightResult


@dataclass(frozen=True)
class ServerResults:
    """What was measured of the running server.

    Attributes:
        triton: its version.
        dtype: what the encoder's configuration asks for.
        loads: those that could be measured.
        loads_missing: why others are not here, in one line; empty if none is missing.
        cache: how much of what was sent once the cache held.
        idle, loaded: memory after the first texts, and after all loads with a full cache.
    """

    triton: str
    dtype: str
    loads: list[LoadResult]
    loads_missing: str
    cache: CacheFill
    idle: list[ProcessMemory]
    loaded: list[ProcessMemory]

    def load(self, key: str) -> LoadResult | None:
        """The result of a profile, if there is one."""
        return next((load for load in self.loads if load.key == key), None)


@dataclass(frozen=True)
class Results(Run):
    """One run of `python -m perf`.

    Attributes:
        sts: None unless sentence pairs were given.
    """

    cold_start: ColdStart
    server: ServerResults
    closeness: list[Closeness]
    sts: StsResult | None
    weights: WeightResult
    engine: EngineResults

    @property
    def dtype(self) -> str:
        """What the server computed in."""
        asked = self.server.dtype
        return self.engine.served_dtype if asked == "auto" else asked

    def to_json(self) -> str:
        """Everything, medians unrounded."""
        return json.dumps({"dtype": self.dtype, **asdict(self)}, indent=2) + "\n"
