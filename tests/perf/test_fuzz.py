# SPDX-License-Identifier: Apache-2.0
"""`perf.fuzz` goes through its targets, and what ends a target's process is a finding."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from perf.fuzz import run
from perf.fuzz.page import page
from perf.fuzz.run import FuzzResults, main
from perf.fuzz.targets import TARGETS
from perf.machine import describe
from perf.stats import Sample


def test_it_fuzzes_and_writes_its_page(minilm_repository: Path, tmp_path: Path) -> None:
    options = ["--only=gateway: bodies", "--only=client: a hostile server", "--minutes=0.05"]
    options += [f"--repository={minilm_repository}", f"--out={tmp_path}"]
    result = CliRunner().invoke(main, options)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "fuzz.json").read_text())["targets"]
    assert [one["name"] for one in found] == ["gateway: bodies", "client: a hostile server"]
    for one in found:
        assert one["inputs"] > one["replayed"] == len(TARGETS[one["name"]].found)
        assert (one["edges"] is not None) == (one["tool"] == "atheris")
        assert one["faults"] == []
    text = (tmp_path / "fuzz.md").read_text()
    assert "2 targets" in text
    assert f"{found[0]['inputs']:,}" in text


# In place of Python: a process that tells how far it came and with what, and then goes wrong.
PROCESS = """#!/bin/sh
printf '\\007\\0\\0\\0\\0\\0\\0\\0' > "$4/progress"
printf 'the seventh\\0' > "$4/input"
"""


@pytest.mark.parametrize(
    ("goes_wrong", "limits", "what"),
    [
        ("kill -SEGV $$", {}, "ended by SIGSEGV"),
        ("exit 3", {}, "ended with status 3"),
        ("exec sleep 60", {"HANG_S": 1.0}, "one input takes more than 1 s"),
        ("exec sleep 60", {"MOST_MB": 0}, "more than 0 MB"),
    ],
)
def test_what_ends_a_process_is_a_fault_and_not_the_end(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    goes_wrong: str,
    limits: dict[str, float],
    what: str,
) -> None:
    process = tmp_path / "process"
    process.write_text(PROCESS + goes_wrong)
    process.chmod(0o755)
    monkeypatch.setattr(run.sys, "executable", str(process))
    for name, value in {"_MOST_ENDS": 2, **limits}.items():
        monkeypatch.setattr(run, name, value)
    target = TARGETS["gateway: bodies"]
    fuzzed = run._Work(target, tmp_path, tmp_path, seed=0).fuzz(30)
    assert [(fault.what, fault.input) for fault in fuzzed.faults] == [(what, "the seventh")] * 2
    assert fuzzed.inputs == 14
    results = FuzzResults(describe(), False, 1.0, Sample.of([0.0]), 0.5, {}, [fuzzed])
    assert f"{target.name}: {what}" in page(results)
