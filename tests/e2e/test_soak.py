# SPDX-License-Identifier: Apache-2.0
"""A short soak of the whole stack: `python -m perf.soak --quick`, the command as people run it.

The load lasts half a minute: some 1,500 requests on a busy machine of two cores. Memory that grows
by 8 KB a request or more would be seen; an hour of `make soak` sees a hundredth of that.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from perf.machine import ROOT

from .stacks import NEEDED, need

LEAST_LEAK = 8_000.0  # bytes a request
WATCHED = (
    "arrowhead serve",
    "tritonserver",
    "minilm_tokenizer",
    "minilm_encoder",
    "arrowhead gateway",
)


@pytest.fixture(scope="module")
def soaked(minilm_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What it wrote: two Tritons, one gateway, a new version, a killed process."""
    need(*NEEDED)
    out = tmp_path_factory.mktemp("soak") / "results"
    command = [sys.executable, "-m", "perf.soak", "--quick", "--replicas=2", "--gateways=1"]
    command += [f"--repository={minilm_repository}", f"--out={out}"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    # 1: something is not as it should be; what, the tests below say.
    assert run.returncode in (0, 1), run.stderr
    assert (out / "soak.json").exists(), run.stderr
    assert sorted(file.name for file in out.iterdir()) == [
        "soak.json",
        "soak.md",
        "soak_latency.png",
        "soak_memory.png",
    ]
    return json.loads((out / "soak.json").read_text())


def test_nothing_fails_and_no_vector_is_wrong(soaked: Any) -> None:
    assert soaked["failures"] == []
    assert (soaked["wrong"], soaked["lost"]) == ([], "")
    assert soaked["vectors"] > 1000
    assert len(soaked["answered"]) == 9  # kinds of callers
    assert sum(soaked["refused"].values()) > 0 < soaked["hung_up"]


def test_a_version_went_live_and_a_killed_process_came_back(soaked: Any) -> None:
    events = {event["kind"]: event["took_s"] for event in soaked["events"]}
    assert sorted(events) == ["kill", "swap"]
    assert None not in events.values()


def test_handles_threads_and_shared_memory_are_back_at_what_they_were(soaked: Any) -> None:
    grown = [one for one in soaked["rest"] if one["after"] > one["before"] + one["allowed"]]
    assert grown == []
    files = next(one for one in soaked["rest"] if one["of"]["quantity"]["field"] == "shm_files")
    assert files["before"] == files["after"] > 0


@pytest.mark.parametrize("role", WATCHED)
def test_no_request_leaves_kilobytes_behind(soaked: Any, role: str) -> None:
    (memory,) = (
        one
        for one in soaked["trends"]
        if (one["of"]["quantity"]["field"], one["of"]["role"]) == ("private_mb", role)
    )
    asked = sum(soaked["answered"].values()) + sum(soaked["refused"].values()) + soaked["hung_up"]
    an_hour = asked / soaked["load_s"] * 3600
    assert memory["lives"] > 0
    assert memory["slope"]["per_hour"] * 1e6 * memory["processes"] / an_hour < LEAST_LEAK


def test_nothing_is_left_after_the_stop(soaked: Any) -> None:
    assert soaked["left"] == []
