# SPDX-License-Identifier: Apache-2.0
"""`perf.handover` goes through all it measures, against a real Triton with shared memory open."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from click.testing import CliRunner

from perf.handover import ROADS, cpu_s, main


def test_every_road_is_measured_and_nothing_is_left(
    minilm_repository: Path, tmp_path: Path
) -> None:
    before = ours_in_shared_memory()
    options = ["--quick", f"--repository={minilm_repository}", f"--out={tmp_path}"]
    result = CliRunner().invoke(main, options)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "handover.json").read_text())
    works = {one["work"] for one in found["handed"]}
    assert len(works) == 3
    assert [(one["texts"], one["road"]) for one in found["handed"]] == 3 * [
        (texts, road) for texts in (1, 100) for road in ROADS
    ]
    assert all(one["client_ms"]["low"] > 0 for one in found["handed"])
    assert all(one["server_ms"]["low"] > 0 for one in found["handed"])
    times = {one["way"]: one["ms"]["median"] for one in found["packings"]}
    # Ten times as long would be no noise any more.
    assert times["an Arrow array"] < 10 * times["a list, packed by tritonclient"]
    text = (tmp_path / "handover.md").read_text()
    assert "| 100, gRPC, vectors in shared memory |" in text
    assert ours_in_shared_memory() == before


def ours_in_shared_memory() -> list[Path]:
    return sorted(Path("/dev/shm").glob("arrowhead-handover-*"))  # noqa: S108


def test_cpu_time_is_that_of_the_process() -> None:
    before, own = cpu_s([os.getpid()]), time.process_time()
    while time.process_time() - own < 0.05:
        pass
    # The kernel counts in hundredths of a second; other threads of this process may add theirs.
    assert 0.03 <= cpu_s([os.getpid()]) - before < 5
