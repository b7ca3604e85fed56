# SPDX-License-Identifier: Apache-2.0
"""`perf.search` goes through all it measures, on a slice of SciFact."""

from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner

from perf.search import main

SCIFACT = Path(__file__).parents[1] / "data" / "scifact-small"


def test_it_goes_all_the_ways(minilm_repository: Path, tmp_path: Path) -> None:
    options = [f"--retrieval={SCIFACT}", f"--repository={minilm_repository}", f"--out={tmp_path}"]
    result = CliRunner().invoke(main, ["--quick", *options])
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "search.json").read_text())
    ways = {one["way"]: one for one in found["quality"]}
    # The store finds what the product of the same vectors finds, to a tie or two.
    assert ways["numpy, the same passages"]["same"] > 99
    exact, numpy = ways["index, exact"], ways["numpy, the same passages"]
    assert abs(exact["ndcg"] - numpy["ndcg"]) < 0.5
    assert abs(exact["recall_100"] - numpy["recall_100"]) < 0.5
    assert ways["index of vectors"]["same"] > 90
    assert exact["ndcg"] > 70
    assert {one["callers"] for one in found["speeds"]} == {1, 8}
    assert found["built"]["again_s"] < found["built"]["seconds"]
    assert found["larger"]["same"] > 95
    text = (tmp_path / "search.md").read_text()
    assert "## What is found" in text
    assert "text to hits, index of vectors" in text
