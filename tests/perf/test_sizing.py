# SPDX-License-Identifier: Apache-2.0
"""`perf.sizing`: the simulation against theory and against what was measured, and its pages."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from pydantic import TypeAdapter

from perf import sizing_fleet
from perf.common import OUT
from perf.machine import ROOT
from perf.report import marked
from perf.sizing import _hits, _needed, _quiet_again, _short
from perf.sizing_events import POLL_S, THRESHOLD, Scaler, deaths, rolling
from perf.sizing_fleet import RULES, Answers, Fleet, bursty, poisson
from perf.sizing_page import page, summary
from perf.sizing_results import SizingResults
from perf.sizing_service import Service, mixed, read, service, short

PLOTS = ["sizing_latency.png"]
# A text of 12 tokens: 10 ms, whatever else comes with it.
EVEN = Service("float32", step_ms=0, text_ms=4, token_ms=0.5, way_ms=1, spread=0, off=0)


def load(fleet: Fleet, rate_s: float, seconds: float) -> None:
    fleet.arrive(poisson(fleet.random, rate_s, seconds), short)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, str]:
    """What `python -m perf.sizing --quick` writes."""
    out = tmp_path_factory.mktemp("sizing") / "results"
    command = [sys.executable, "-m", "perf.sizing", "--quick", f"--out={out}"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    names = sorted(file.name for file in out.iterdir())
    assert names == sorted(["sizing.json", "sizing.md", *PLOTS])
    return json.loads((out / "sizing.json").read_text()), (out / "sizing.md").read_text()


def test_one_simulated_server_is_as_quick_as_the_measured_one(written: tuple[Any, str]) -> None:
    checks = [one for one in written[0]["checks"] if one["load"]["source"] == "profile.json"]
    assert len(checks) == 2
    for check in checks:
        for key in ("p50_ms", "requests_s"):
            assert check[key] == pytest.approx(check["load"][key]["median"], rel=0.1)
        # What its p99 lacks stands on the page.
        assert check["p99_ms"] == pytest.approx(check["load"]["p99_ms"]["median"], rel=0.4)
    assert written[0]["margin"] >= 1


def test_a_p99_that_is_promised_is_as_high_as_the_measured_ones(written: tuple[Any, str]) -> None:
    found = written[0]
    worst = max(one["load"]["p99_ms"]["median"] / one["p99_ms"] for one in found["checks"])
    assert found["margin"] * found["tail"] == pytest.approx(max(worst, found["margin"]))
    fast, slow = (
        _needed(Service("float32", 0, 4, 0.5, 1, spread=0.3, off=0), tail, 60.0, 150.0, 2000)
        for tail in (1.0, 1.5)
    )
    assert fast.replicas < slow.replicas
    assert fast.p99_ms <= 150 >= slow.p99_ms


def test_what_no_fleet_answers_in_time_is_said_so() -> None:
    assert _needed(EVEN, 1.0, 60.0, 1.0, 500).replicas == 0  # one text takes ten milliseconds


def test_a_smoke_run_says_so(written: tuple[Any, str]) -> None:
    assert "A smoke run" in written[1]
    assert {one["rule"] for one in written[0]["rules"]} == set(RULES)


def test_without_figures_it_says_what_to_run(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "perf.sizing", f"--figures={tmp_path}", f"--out={tmp_path}"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1
    assert "make profile" in run.stderr


@pytest.mark.parametrize("busy", [0.5, 0.8])
def test_one_at_a_time_it_waits_as_theory_says(busy: float, monkeypatch: Any) -> None:
    """Poisson arrivals, a fixed service time, one server: M/D/1 (Pollaczek, Khinchine)."""
    monkeypatch.setattr(sizing_fleet, "MOST_TEXTS", 1)
    fleet = Fleet(EVEN, 1)
    load(fleet, busy * 100, 1000)
    waited = np.mean(fleet.run().ms) - EVEN.hold_ms(1, 12) - EVEN.way_ms
    assert waited == pytest.approx(10 * busy / (2 * (1 - busy)), rel=0.15)


def test_steps_take_what_waits() -> None:
    fleet = Fleet(EVEN, 1)
    fleet.arrive(np.array([0.0, 1.0, 2.0, 3.0]), short)
    # The first alone: 10 ms. The others together: from then on 30 ms. Beside that 1 ms of way.
    assert fleet.run().ms.tolist() == pytest.approx([11, 40, 39, 38])


def test_steps_vary_around_what_they_take() -> None:
    service = Service("float32", 0, 10, 0, 0, spread=0.3, off=0)
    fleet = Fleet(service, 1)
    held = [fleet._hold_ms(1, 12) for _ in range(20_000)]
    assert np.mean(held) == pytest.approx(10, rel=0.02)
    assert np.std(np.log(held)) == pytest.approx(0.3, rel=0.05)
    many = [fleet._hold_ms(100, 1200) for _ in range(20_000)]
    assert np.std(np.log(many)) == pytest.approx(0.03, rel=0.05)


def test_a_closed_loop_keeps_its_clients_busy() -> None:
    fleet = Fleet(EVEN, 1, balancers=1)
    fleet.loop(1, short)
    answers = fleet.run(10)
    assert set(answers.ms.tolist()) == {11.0}
    assert answers.requests_s == pytest.approx(1e3 / 11, rel=0.01)


@pytest.mark.parametrize("arrivals", [poisson, bursty])
def test_arrivals_come_at_the_rate_asked_for(arrivals: Any) -> None:
    moments = arrivals(np.random.default_rng(3), 50.0, 4000.0)
    assert len(moments) == pytest.approx(200_000, rel=0.05)
    assert np.all(np.diff(moments) >= 0)
    counts = np.bincount((moments / 100).astype(int))  # in each tenth of a second
    # Alone a Poisson's variance is its mean.
    index = counts.var() / counts.mean()
    assert index == pytest.approx(1, rel=0.1) if arrivals is poisson else index > 1.5


def test_who_counts_requests_spreads_them_better() -> None:
    p99 = {}
    for rule in RULES:
        fleet = Fleet(EVEN, 10, rule=rule)
        load(fleet, 800, 60)
        p99[rule] = fleet.run().percentile(99)
    assert p99["least requests"] < p99["two choices"] < p99["random"]
    assert p99["round robin"] < p99["random"]


@pytest.mark.parametrize("rule", RULES)
def test_no_request_is_lost_or_answered_twice_where_replicas_die(rule: str) -> None:
    fleet = Fleet(EVEN, 3, rule=rule)
    moments = poisson(fleet.random, 150, 30)
    fleet.arrive(moments, short)
    fleet.environment.process(deaths(fleet, 1, 3, 1))
    answers = fleet.run(60)
    assert sorted(answers.came) == pytest.approx(moments.tolist())
    assert fleet.under_way == 0
    assert answers.percentile(100) < 2000


def test_who_is_not_offered_gets_nothing() -> None:
    fleet = Fleet(EVEN, 2)
    load(fleet, 100, 20)
    fleet.environment.process(rolling(fleet, 5, 5))
    given: list[tuple[float, int]] = []
    send = fleet._send

    def seen(request: Any) -> None:
        send(request)
        given.append((fleet.environment.now, request.replica))

    fleet._send = seen  # type: ignore[method-assign]
    fleet.run(25)
    assert {at for when, at in given if 5000 < when < 10_000} == {1}
    assert {at for when, at in given if 10_000 < when < 15_000} == {0}
    assert {at for when, at in given if when > 15_000} == {0, 1}


def test_what_there_is_no_room_for_is_refused() -> None:
    fleet = Fleet(EVEN, 1, room=10)
    fleet.arrive(np.linspace(0, 1, 15), short)
    answers = fleet.run()
    assert (len(answers.ms), len(fleet.refused)) == (10, 5)


def test_the_scaler_adds_replicas_until_the_load_is_taken() -> None:
    fleet = Fleet(EVEN, 1, room=512)
    load(fleet, 350, 300)
    scaler = Scaler(fleet, start_s=20, most=12, sizes=[])
    fleet.environment.process(scaler.run())
    answers = fleet.run(300)
    assert len(fleet.replicas) >= 4
    first = scaler.sizes[0][0]
    assert first == pytest.approx(POLL_S + 20)
    assert [size for _, size in scaler.sizes] == list(range(2, len(fleet.replicas) + 1))
    assert answers.between(250, 290).percentile(99) < 250


def test_the_scaler_leaves_a_quiet_fleet_alone() -> None:
    fleet = Fleet(EVEN, 2)
    load(fleet, 100, 120)
    scaler = Scaler(fleet, start_s=1, most=12, sizes=[])
    fleet.environment.process(scaler.run())
    fleet.run(120)
    assert scaler.sizes == []


def test_the_scaler_is_the_one_of_kubernetes() -> None:
    file = ROOT / "deploy" / "kubernetes" / "components" / "autoscaling" / "scaledobjects.yaml"
    scaled = list(yaml.safe_load_all(file.read_text(encoding="utf-8")))
    (spec,) = (one["spec"] for one in scaled if one["metadata"]["name"] == "triton")
    thresholds = {one["name"]: one["metadata"]["threshold"] for one in spec["triggers"]}
    assert float(thresholds["under-way"]) == THRESHOLD
    assert spec["pollingInterval"] == POLL_S
    up = spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]["scaleUp"]
    assert up["policies"] == [{"type": "Percent", "value": 100, "periodSeconds": POLL_S}]
    assert (spec["minReplicaCount"], spec["maxReplicaCount"]) == (3, 12)


def test_a_line_through_what_the_engine_takes() -> None:
    profile = read(OUT, "profile.json")
    for series in profile["scaling"]["series"]:
        for point in series["points"]:
            tokens = point["texts"] * point["tokens"]
            point["us"]["median"] = (2.0 + 0.25 * tokens) / tokens * 1e3
    found = service(profile, "float32")
    assert (found.step_ms, found.token_ms, found.off) == pytest.approx((2, 0.25, 0), abs=1e-6)
    assert found.slower(2).hold_ms(3, 40) == pytest.approx(2 * found.hold_ms(3, 40))


def test_quiet_again_after_the_last_loud_second() -> None:
    came = np.arange(0, 60_000, 100.0)
    ms = np.where((came >= 20_000) & (came < 31_000), 400.0, 10.0)
    assert _quiet_again(Answers(came, ms, 60), 20, 60) == pytest.approx(11)
    assert _quiet_again(Answers(came, np.full(len(came), 400.0), 60), 20, 60) is None


def test_one_to_spare_by_hand() -> None:
    # Two of three are needed, each away a tenth of the time: all away, or but one.
    assert _short(2, 3, 0.1) == pytest.approx(0.1**3 + 3 * 0.9 * 0.1**2)


def test_a_memory_forgets_what_was_used_longest_ago() -> None:
    # 2 takes the place of 1, which was used before 0.
    hits = [False, False, True, False, True, False]
    assert _hits([0, 1, 0, 2, 0, 1], entries=2, count=1) == hits
    assert not any(_hits(list(range(10)), entries=100, count=3))


def test_mixed_texts_are_as_long_as_those_measured() -> None:
    lengths = mixed(np.random.default_rng(1), 10_000)
    assert (lengths.min(), lengths.max()) == (7, 62)


@pytest.fixture(scope="module")
def kept() -> SizingResults:
    text = (OUT / "sizing.json").read_text(encoding="utf-8")
    return TypeAdapter(SizingResults).validate_json(text)


def test_the_pages_are_those_of_the_figures(kept: SizingResults) -> None:
    assert kept.quick is False
    assert (OUT / "sizing.md").read_text(encoding="utf-8") == page(kept, PLOTS)
    guide = (ROOT / "docs" / "sizing.md").read_text(encoding="utf-8")
    assert guide == marked(guide, "sizing", summary(kept))


def test_the_figures_are_of_the_servers_that_are_measured(kept: SizingResults) -> None:
    assert kept.service == service(read(OUT, "profile.json"), kept.service.dtype)
