# SPDX-License-Identifier: Apache-2.0
"""`perf.soak`: a known leak is seen, noise is none, and the page says which. A soak: tests/e2e."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from perf.machine import describe
from perf.soak_load import Asked, TextPool, WrongVector
from perf.soak_page import conclusion, draw, page
from perf.soak_results import (
    GROWS,
    OF_ALL,
    OF_PROCESSES,
    SLOWER,
    SOUND,
    STEADY,
    UNCLEAR,
    UNSOUND,
    Drift,
    Event,
    Failure,
    Life,
    Of,
    Rest,
    SoakResults,
    trend,
)
from perf.soak_watch import History, Moment, Process, lives
from perf.stats import Sample

MEMORY = Of(OF_PROCESSES[0], "minilm_encoder")
BOUND = MEMORY.quantity.bound


def life(
    leak: float = 0.0,
    *,
    seconds: float = 3600.0,
    start_s: float = 0.0,
    warm_mb: float = 30.0,
    noise_mb: float = 0.5,
    seed: int = 0,
) -> Life:
    """A process sampled every 5 s: warms up within a minute, then leaks so many MB an hour."""
    rng = np.random.default_rng(seed)
    age = np.arange(0, seconds, 5.0)
    steps = rng.normal(0, noise_mb, len(age))
    for place in range(1, len(steps)):  # what follows is like what was before
        steps[place] += 0.8 * steps[place - 1]
    values = 40 + warm_mb * (1 - np.exp(-age / 10)) + leak * age / 3600 + steps
    return Life(start_s + age, values)


@pytest.mark.parametrize("leak", [-20.0, 0.0, 60.0, 500.0])
def test_the_slope_is_the_leak_whatever_the_noise(leak: float) -> None:
    inside = 0
    for seed in range(10):
        slope = trend(MEMORY, [life(leak, seed=seed)], warm_up_s=60).slope
        assert slope is not None
        assert slope.per_hour == pytest.approx(leak, abs=2.0)
        inside += slope.low <= leak <= slope.high
    assert inside >= 7  # of intervals of 95 %


@pytest.mark.parametrize(
    ("leak", "verdict"), [(0.0, STEADY), (BOUND * 0.7, STEADY), (BOUND * 1.5, GROWS)]
)
def test_the_verdict_follows_the_bound(leak: float, verdict: str) -> None:
    assert trend(MEMORY, [life(leak)], warm_up_s=60).verdict == verdict


def test_a_short_soak_does_not_decide_what_it_cannot_see() -> None:
    for seed in range(10):
        short = life(BOUND, seconds=300, noise_mb=2.0, seed=seed)
        assert trend(MEMORY, [short], warm_up_s=60).verdict == UNCLEAR
    nothing = trend(MEMORY, [life(seconds=30)], warm_up_s=60)
    assert (nothing.lives, nothing.slope, nothing.verdict) == (0, None, UNCLEAR)


def test_a_leak_is_seen_though_processes_are_replaced() -> None:
    """Each lives ten minutes; over all of them memory does not grow at all."""
    some = [life(200.0, seconds=600, start_s=600.0 * n, noise_mb=0.2, seed=n) for n in range(6)]
    joined = Life(*(np.concatenate([getattr(one, f) for one in some]) for f in ("at_s", "values")))
    assert trend(MEMORY, some, warm_up_s=60).verdict == GROWS
    assert trend(MEMORY, [joined], warm_up_s=60).slope.per_hour < BOUND  # type: ignore[union-attr]


def test_a_jump_and_a_spike_are_no_leak() -> None:
    one = life()
    one.values[300] += 500.0
    one.values[:100] += 10.0  # given back after some minutes
    assert trend(MEMORY, [one], warm_up_s=60).verdict == STEADY


def test_a_life_is_cut_at_events() -> None:
    one = Life(np.arange(4.0), np.arange(4.0) * 10)
    pieces = [piece.values.tolist() for piece in one.cut([-1.0, 1.5, 9.0])]
    assert pieces == [[0, 10], [20, 30]]


def test_what_never_changes_has_no_slope() -> None:
    flat = Life(np.arange(0, 600, 5.0), np.full(120, 17.0))
    found = trend(Of(OF_PROCESSES[1], "haproxy"), [flat], warm_up_s=60)
    assert found.slope is not None
    assert (found.slope.per_hour, found.slope.low, found.slope.high) == (0, 0, 0)
    assert (found.first, found.last, found.verdict) == (17, 17, STEADY)


def process(role: str, pid: int, mb: float) -> Process:
    return Process("triton1", role, pid, mb + 20, mb + 10, mb, 12, 4, 1.0)


def moment(at_s: float, *processes: Process) -> Moment:
    return Moment(at_s, list(processes), shm_files=2, shm_mb=2.1, other_work=1.0)


def test_each_process_has_its_own_life() -> None:
    moments = [
        moment(0, process("a", 1, 10), process("b", 2, 20)),
        moment(5, process("a", 1, 11), process("b", 3, 5)),
    ]
    first, second = lives(moments, "b", "private_mb")
    assert (first.values.tolist(), second.at_s.tolist()) == ([20.0], [5.0])
    (only,) = lives(moments, "a", "private_mb")
    assert only.values.tolist() == [10.0, 11.0]
    assert moments[0].held("handles") == {"a": 12.0, "b": 12.0}
    assert moments[0].pss_mb == 50


def vectors(*rows: list[float]) -> npt.NDArray[np.float32]:
    return np.array(rows, np.float32)


RIGHT = vectors([1.0, 0.0], [0.6, 0.8])


@pytest.mark.parametrize(
    "wrong",
    [
        RIGHT[::-1],
        RIGHT[:1],
        RIGHT * 0.9,
        vectors([1.0, 0.0], [float("nan"), 0.8]),
        vectors([1.0, 0.0], [0.62, 0.7846]),
    ],
    ids=["swapped", "too few", "too short", "nan", "near"],
)
def test_a_wrong_vector_is_told(wrong: npt.NDArray[np.float32]) -> None:
    asked = Asked(["a", "b"], RIGHT)
    assert asked.check(RIGHT * np.float32(1.0001)) == 2
    with pytest.raises(WrongVector):
        asked.check(wrong)


def test_known_texts_are_new_each_time_and_have_the_engines_vectors(
    minilm_repository: Path,
) -> None:
    from arrowhead_engine.encoder import Encoder
    from arrowhead_engine.tokenizer import Tokenizer

    known = TextPool(minilm_repository, 1)
    new, long, again = known.new(50), known.long(), known.again(200)
    assert len({*new.texts, *known.new(50).texts}) == 100
    assert len(set(again.texts)) < 200
    texts = new.texts + long.texts + again.texts
    tokens = Tokenizer.open(minilm_repository / "minilm_tokenizer" / "1")(texts)
    encoder = Encoder.open(minilm_repository / "minilm_encoder" / "1" / "weights.parquet")
    found = encoder.embed(encoder.check(tokens.input_ids, tokens.length))
    wanted = np.concatenate([new.vectors, long.vectors, again.vectors])
    assert Asked(texts, wanted).check(found) == 251


@pytest.fixture
def results() -> SoakResults:
    return SoakResults(
        machine=describe(),
        quick=False,
        seconds=3700.0,
        other_work=Sample.of([1.0, 2.0, 60.0]),
        replicas=3,
        gateways=2,
        peak=100.0,
        load_s=3600.0,
        answered={"gRPC": 197_900},
        vectors=400_000,
        wrong=[],
        refused={"gRPC, not UTF-8": 100},
        hung_up=2000,
        failures=[],
        skipped_s=0.0,
        trends=[
            trend(MEMORY, [life(0.0)], warm_up_s=60, processes=3),
            trend(Of(OF_ALL[0], "all"), [life(0.0)], warm_up_s=60),
        ],
        rest=[Rest(Of(OF_PROCESSES[1], "haproxy"), 30, 32, 8)],
        drifts=[Drift("gRPC", 197_900, 5.0, 5.5, 20.0, 19.0)],
        events=[Event(150.0, "swap", "promote to version 2", 3.25)],
        left=[],
        lost="",
    )


def test_the_page_says_what_was_found(results: SoakResults, tmp_path: Path) -> None:
    moments = [
        moment(at_s, process("minilm_encoder", 7, 60 + at_s / 1e3)) for at_s in range(0, 3600, 60)
    ]
    latency = Life(np.arange(0, 3600, 2.0), np.full(1800, 5.0))
    history = History(moments, {"gRPC": latency}, results.events)
    drawn = draw(results, history, tmp_path)
    text = page(results, drawn)
    assert all(f"({name})" in text for name in drawn)
    assert all(1000 < (tmp_path / name).stat().st_size < 200_000 for name in drawn)
    assert "| requests | 200,000 |" in text
    assert "| failed requests | 0 |" in text
    assert "| gRPC | 197,900 | 5.0 | 5.5 | 1.10 | 20 | 19 | steady |" in text
    assert "| promote to version 2 | 2.5 | 3.2 |" in text
    assert "| open handles of haproxy | 30 | 32 | 8 | steady |" in text
    assert results.outcome == SOUND
    assert "| altogether | sound |" in text
    assert not results.is_disturbed
    assert json.loads(results.to_json())["answered"] == {"gRPC": 197_900}


def test_growth_is_told_by_request(results: SoakResults) -> None:
    leaking = trend(MEMORY, [life(100.0, noise_mb=0.0)], warm_up_s=60, processes=3)
    spread = results.bytes_a_request(leaking)
    assert spread is not None
    assert spread[0] == pytest.approx(3 * 100e6 / 200_000, rel=0.01)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            lambda r: replace(r, trends=[trend(MEMORY, [life(90.0)], warm_up_s=60)]),
            ("grows", "private memory of minilm_encoder, MB"),
        ),
        (
            lambda r: replace(r, rest=[Rest(Of(OF_ALL[1], "all"), 6, 7, 0)]),
            ("grows", "files in /dev/shm of all"),
        ),
        (lambda r: replace(r, failures=[Failure("gRPC", "503", 2)]), ("failed requests", "2")),
        (
            lambda r: replace(r, drifts=[Drift("gRPC", 9, 5.0, 8.0, 9.0, 9.0)]),
            ("p50 more than 1.5 times that of the first third", "gRPC"),
        ),
        (
            lambda r: replace(r, left=["arrowhead-1-x"]),
            ("left behind after the stop", "arrowhead-1-x"),
        ),
        (lambda r: replace(r, lost="after 7 s: x"), ("ended early", "after 7 s: x")),
    ],
    ids=["leak", "rest", "failure", "drift", "left", "lost"],
)
def test_a_soak_with_a_fault_is_not_sound(
    results: SoakResults, change: Callable[[SoakResults], SoakResults], told: tuple[str, str]
) -> None:
    changed = change(results)
    assert changed.outcome == UNSOUND
    assert told in conclusion(changed)
    assert told not in conclusion(results)


def test_what_is_unclear_is_neither_sound_nor_a_fault(results: SoakResults) -> None:
    short = trend(MEMORY, [life(seconds=30)], warm_up_s=60)
    unclear = replace(results, trends=[*results.trends, short])
    assert unclear.outcome == UNCLEAR
    assert "What is unclear is neither sound nor a leak" in page(unclear, [])
    assert "What is unclear" not in page(results, [])
    assert replace(unclear, left=["arrowhead-1-x"]).outcome == UNSOUND


def test_drift_is_not_held_against_a_machine_that_others_use(results: SoakResults) -> None:
    drifting = replace(results, drifts=[Drift("gRPC", 9, 5.0, 8.0, 9.0, 9.0)])
    assert drifting.drifts[0].verdict == SLOWER
    assert replace(drifting, other_work=Sample.of([50.0])).outcome == SOUND
