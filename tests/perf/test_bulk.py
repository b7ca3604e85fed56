# SPDX-License-Identifier: Apache-2.0
"""`perf.bulk` goes through all it measures, on Ray too."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(600)
def test_it_goes_all_the_ways(minilm_repository: Path, tmp_path: Path) -> None:
    # A process of its own: Ray's threads, and a pool's, warn of much that is none of ours.
    options = ["--quick", f"--repository={minilm_repository}", f"--out={tmp_path}"]
    command = [sys.executable, "-m", "perf.bulk", *options]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stderr
    found = json.loads((tmp_path / "bulk.json").read_text())
    rates = found["rates"]
    assert list(rates) == ["one process", "encode", "encode over a pool, one thread each"]
    assert all(one["rows"]["low"] > 0 and one["tokens"]["low"] > 0 for one in rates.values())
    assert 80 < found["tokens_a_row"] < 130
    assert found["nothing_s"]["Ray"]["median"] > found["nothing_s"]["one process"]["median"]
    (one,) = found["on_ray"]
    assert (one["workers"], one["worker_mb"] > 100, one["all_mb"] > one["worker_mb"]) == (1, 1, 1)
    assert found["one_mb"] > 100
    size = found["bytes_a_row"]
    # 384 components, and little beside them: the number of the row, tokens, and whether it was cut.
    for precision, wanted in (("float32", 1536), ("float16", 768), ("int8", 384), ("binary", 48)):
        assert wanted < size[precision] < wanted + 60
    page = (tmp_path / "bulk.md").read_text()
    assert "A smoke run" in page
    assert f"| output in int8, GB | {size['int8']:,.0f} |" in page
