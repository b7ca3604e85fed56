# SPDX-License-Identifier: Apache-2.0
"""Everything is broken once, under load: no wrong vector, no failed request, and all is well again.

`make faults` does the same for longer, and measures. Here counts are strict, times are generous:
other work on the machine makes them long.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from perf import faults_full
from perf.faults import FAULTS, LONG_WORDS, QUICK, Bench, fault, two_versions
from perf.faults_load import Known
from perf.faults_overload import overload
from perf.faults_page import WORK

from . import stacks

EFFORT = replace(QUICK, around_s=1.5)
NOISY_RECOVERY_S, NOISY_WORK_S = 15.0, 90.0
LEAST = 200  # requests; on two quiet cores it is thousands
IN_NAMESPACES = ("full_shared_memory", "full_disk")


@pytest.fixture(scope="module")
def bench(minilm_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    repository, versions = two_versions(minilm_repository, tmp_path_factory.mktemp("faults"))
    known = Known(repository, versions)
    closest = (known.vectors[versions[0]] * known.vectors[versions[1]]).sum(1).max()
    assert closest < 0.999  # so that an answer tells its version
    with stacks.started(repository) as stack:
        yield Bench(stack, repository, known, versions)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", FAULTS)
def test_nothing_fails_and_no_vector_is_wrong(
    bench: Bench, name: str, measured: Callable[..., None]
) -> None:
    if name in IN_NAMESPACES and (why := faults_full.impossible()):
        if os.environ.get("CI"):
            pytest.fail(f"no mount namespaces here: {why}")
        pytest.skip(f"no mount namespaces here: {why}")
    result = fault(bench, name, EFFORT)
    measured("in", result.requests, "requests")
    measured("worst latency", result.since.worst_ms, "ms")
    measured("recovery", result.recovery_s)
    assert result.amiss == 0, result.failures
    assert result.failed < 0.1 * result.requests
    assert result.wrong == 0
    assert result.facts == dict.fromkeys(result.facts, True), result.notes
    assert result.recovery_s < (NOISY_WORK_S if name in WORK else NOISY_RECOVERY_S)
    assert result.requests > LEAST


@pytest.mark.timeout(600)
@pytest.mark.parametrize("words", [None, LONG_WORDS], ids=["short texts", "long texts"])
def test_ten_times_too_many_requests(
    bench: Bench, words: tuple[int, int] | None, measured: Callable[..., None]
) -> None:
    known = Known(bench.repository, bench.versions[:1], words) if words else bench.known
    found = overload(bench.stack, known, EFFORT.overload_s)
    measured("share of the peak", 100 * found.share, "%")
    measured("offered", found.offered / found.seconds, "requests/s")
    assert found.wrong == found.untold == 0
    assert set(found.statuses) <= {"200", "429", "503"}
    assert found.statuses["429"] > found.statuses["200"]
    assert found.share > 0.4  # alone on the machine: more than 0.9; others may come meanwhile
    assert found.recovery_s < NOISY_RECOVERY_S
    assert found.memory_mb[1] < found.memory_mb[0] + 700


def test_callers_know_wrong_vectors(bench: Bench) -> None:
    known, (old, new) = bench.known, bench.versions
    places = [3, 4, 5]
    right = known.vectors[old][places]
    assert known.version(places, right) == old
    assert known.version(places, known.vectors[new][places]) == new
    mixed = right.copy()
    mixed[1] = known.vectors[new][4]
    for wrong in (mixed, right[::-1], right[:2], right * 1.05, right + 0.001):
        assert known.version(places, wrong) == 0
