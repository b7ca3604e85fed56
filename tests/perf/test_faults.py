# SPDX-License-Identifier: Apache-2.0
"""`perf.faults`: what counts as a goal that was missed, its page, and the command.

The faults themselves are in tests/e2e/test_faults.py.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from perf.faults_load import Phase, Sent
from perf.faults_overload import Overload
from perf.faults_page import FaultResult, FaultResults, missed_overload, page
from perf.machine import ROOT, describe
from perf.stats import Sample
from tests.e2e.stacks import NEEDED, need

CALM = Phase(1000, 0, 10.0, 20.0, 30.0, 400.0)
WELL = FaultResult(
    key="kill_triton",
    title="A Triton dies.",
    requests=3000,
    failed=0,
    wrong=0,
    failures={},
    before=CALM,
    since=replace(CALM, requests=2000, worst_ms=700.0),
    slow=1,
    limit_ms=500.0,
    recovery_s=1.25,
    whole_s=4.0,
    facts={"it came back": True},
    notes=["a note"],
)
BROKE_OFF = "Triton gRPC: Unavailable: an answer of grpc://h:1 broke off (UNKNOWN: X): ask again."
BORNE = {"Triton gRPC: Unavailable: gone": 5, "gateway: Refused: ('HTTP 503', b'')": 4}
FLOODED = Overload(
    seconds=60.0,
    peak_s=400.0,
    good_s=380.0,
    offered=240_000,
    unsent=10,
    statuses={"429": 217_000, "200": 22_800},
    wrong=0,
    untold=0,
    p50_ms=900.0,
    p99_ms=2000.0,
    worst_ms=2500.0,
    refused_p99_ms=40.0,
    recovery_s=0.5,
    memory_mb=(300.0, 560.0),
    callers_cores=(0.1, 0.1),
    cores=2,
)


@pytest.mark.parametrize(
    ("changed", "missed"),
    [
        ({}, []),
        ({"failed": 2, "wrong": 1, "failures": {"gateway: X": 2}}, ["1 wrong", "2 failed"]),
        ({"failed": 1, "failures": {BROKE_OFF: 1}}, []),
        ({"failed": 1, "failures": {BROKE_OFF: 1}, "key": "kill_encoder"}, ["1 failed"]),
        ({"failed": 9, "key": "poisoned", "failures": BORNE}, []),
        ({"failed": 11, "key": "poisoned", "failures": BORNE | {"gateway: X": 2}}, ["2 failed"]),
        ({"failed": 9, "failures": BORNE}, ["9 failed"]),
        ({"failed": 2, "key": "pause_server", "failures": {"Triton gRPC: Unavailable: a": 2}}, []),
        ({"failed": 1, "key": "pause_server", "failures": {"gateway: X": 1}}, ["1 failed"]),
        ({"recovery_s": 5.0}, ["recovery 5.0 s"]),
        ({"recovery_s": 29.0, "key": "hot_swap"}, []),
        ({"recovery_s": 30.0, "key": "hot_swap"}, ["recovery 30.0 s"]),
        ({"facts": {"it came back": False}}, ["not so: it came back"]),
    ],
)
def test_goals_that_are_missed_are_told(changed: dict[str, object], missed: list[str]) -> None:
    assert replace(WELL, **changed).missed() == missed  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changed", "missed"),
    [
        ({}, []),
        ({"good_s": 340.0}, ["85% of the peak"]),
        ({"good_s": 340.0, "callers_cores": (0.0, 0.2)}, []),  # the callers had the rest
        ({"callers_cores": (0.4, 0.0)}, ["76% of the peak"]),
        ({"untold": 3}, ["3 without Retry-After"]),
        ({"statuses": {"200": 9, "500": 1}}, ["other answers: {'500': 1}"]),
        ({"wrong": 1, "recovery_s": 6.0}, ["1 wrong", "recovery 6.0 s"]),
    ],
)
def test_goals_of_the_overload(changed: dict[str, object], missed: list[str]) -> None:
    assert missed_overload(replace(FLOODED, **changed)) == missed  # type: ignore[arg-type]


def test_a_phase_counts_right_answers_and_times_all() -> None:
    sent = [Sent("a", 0.0, 0.1, 1, ""), Sent("a", 0.5, 0.3, 0, "gone")]
    phase = Phase.of(sent, 2.0)
    assert (phase.requests, phase.failed, phase.rate) == (2, 1, 0.5)
    assert (phase.p50_ms, phase.worst_ms) == pytest.approx((200.0, 300.0))


def test_the_page_tells_all() -> None:
    broken = replace(WELL, key="kill_server", failed=2, failures={"gateway: HTTP 503": 2})
    results = FaultResults(
        machine=describe(),
        quick=False,
        seconds=600.0,
        other_work=Sample.of([1.0, 30.0]),
        faults=[WELL, broken],
        overload=[replace(FLOODED, good_s=good) for good in (360.0, 380.0, 390.0)],
        overload_long=[replace(FLOODED, offered=60_000, unsent=30_000)],
        left_out={"full_disk": "no namespaces"},
    )
    text = page(results)
    rows = {line.split("`")[1]: line for line in text.splitlines() if line.startswith("| `")}
    assert rows["kill_triton"].endswith("| 1.2 | 4.0 | met |")
    assert rows["kill_server"].endswith("missed: 2 failed |")
    for part in (
        "- 2 x gateway: HTTP 503",
        "- a note",
        "380 (95%)",
        "90%, 95%, 98%",
        "30 % of the cores",
    ):
        assert part in text
    assert "500 a second were sent, for the others (30,000 of 60,000) all connections" in text
    assert "`full_disk` was left out: no namespaces." in text
    assert json.loads(results.to_json())["faults"][1]["failures"] == {"gateway: HTTP 503": 2}


@pytest.mark.timeout(600)
def test_the_command_breaks_what_it_is_told_to(minilm_repository: Path, tmp_path: Path) -> None:
    need(*NEEDED)
    command = [sys.executable, "-m", "perf.faults", "--quick", "--only=kill_triton"]
    command += [f"--repository={minilm_repository}", f"--out={tmp_path}"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    (one,) = json.loads((tmp_path / "faults.json").read_text())["faults"]
    assert (one["key"], one["failed"], one["wrong"]) == ("kill_triton", 0, 0)
    assert one["requests"] > 100
    assert "A smoke run" in (tmp_path / "faults.md").read_text()
