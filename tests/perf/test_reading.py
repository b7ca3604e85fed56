# SPDX-License-Identifier: Apache-2.0
"""What others write, read: perf_analyzer, the kernel, Triton, CSV."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from perf.machine import busy_percent, cpu_facts
from perf.perf_analyzer import (
    Measured,
    PerfAnalyzer,
    PerfAnalyzerFailed,
    PerfAnalyzerUnavailable,
    input_data,
    parse_report,
)
from perf.server import CacheCounts, parse_cache_counts, parse_smaps_rollup

# As perf_analyzer 2.50 writes it for `-b 32`.
REPORT = """\
Concurrency,Inferences/Second,Client Send,Network+Server Send/Recv,Server Queue,\
Server Compute Input,Server Compute Infer,Server Compute Output,Server Cache Hit,\
Server Cache Miss,Client Recv,p50 latency,p90 latency,p95 latency,p99 latency
1,320,11,73,17,79,89254,2229,0,70,4,64094,176449,194105,356289
"""

ROLLUP = """\
55d0c0a00000-7fff8a5f2000 ---p 00000000 00:00 0                          [rollup]
Rss:              100000 kB
Pss:               50000 kB
Pss_Dirty:         40000 kB
Pss_Anon:          30000 kB
"""


def test_a_report_is_read_in_ms_and_requests():
    assert parse_report(REPORT, batch=32) == Measured(64.094, 176.449, 356.289, 10.0)


@pytest.mark.parametrize(
    "report", ["", "Concurrency,Inferences/Second\n1,2\n", REPORT.replace("64094", "many")]
)
def test_an_unreadable_report_is_one_named_error(report):
    with pytest.raises(PerfAnalyzerFailed, match="cannot be read"):
        parse_report(report, batch=1)


def test_each_text_is_one_step_of_the_input_data():
    assert json.loads(input_data(["one", "zwölf"])) == {
        "data": [
            {"text": {"content": ["one"], "shape": [1]}},
            {"text": {"content": ["zwölf"], "shape": [1]}},
        ]
    }


def test_a_program_that_does_not_run_is_unavailable(tmp_path: Path):
    with pytest.raises(PerfAnalyzerUnavailable, match="does not run here"):
        PerfAnalyzer(tmp_path / "missing", tmp_path).check()


def test_a_program_that_fails_says_why(tmp_path: Path):
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\necho no library >&2\nexit 127\n", encoding="utf-8")
    program.chmod(0o755)
    with pytest.raises(PerfAnalyzerUnavailable, match="no library"):
        PerfAnalyzer(program, tmp_path).check()
    with pytest.raises(PerfAnalyzerFailed, match="no library"):
        PerfAnalyzer(program, tmp_path).measure("minilm", "127.0.0.1:1", ["a text"])


def test_memory_is_read_in_mb():
    memory = parse_smaps_rollup("tritonserver", ROLLUP)
    assert memory.name == "tritonserver"
    assert memory.rss_mb == pytest.approx(102.4)
    assert memory.pss_mb == pytest.approx(51.2)


def test_cache_counts_are_requests():
    counts = {"cache_hit": {"count": 7, "ns": 9}, "cache_miss": {"count": 3, "ns": 8}}
    read = parse_cache_counts({"model_stats": [{"inference_stats": counts}]})
    assert read == CacheCounts(7, 3)
    assert read.since(CacheCounts(5, 3)) == CacheCounts(2, 0)


def test_the_first_processor_is_described():
    facts = cpu_facts("model name\t: A\nflags\t\t: x y\n\nmodel name\t: B\n")
    assert facts["model name"] == "A"
    assert facts["flags"] == "x y"


def test_busy_time_is_all_but_idle_and_waiting_for_disks():
    before = "cpu  100 0 100 1000 50 0 0 0 0 0\ncpu0 1 1 1 1\n"
    after = "cpu  140 0 110 1120 80 0 0 0 0 0\ncpu0 2 2 2 2\n"
    assert busy_percent(before, after) == pytest.approx(25.0)
