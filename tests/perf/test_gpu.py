# SPDX-License-Identifier: Apache-2.0
"""`perf.gpu` goes through all it measures, here without a card, and says what it needs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from perf.gpu import main


def test_without_a_card_it_goes_all_the_ways(minilm_repository: Path, tmp_path: Path) -> None:
    options = ["--quick", "--device=cpu", f"--repository={minilm_repository}", f"--out={tmp_path}"]
    result = CliRunner().invoke(main, options)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["graphs"] is False
    assert {(s["texts"], s["tokens"]) for s in found["shapes"]} == {(1, 16), (1, 128), (32, 16)}
    assert all(0 < s["fraction"] < 1.2 for s in found["shapes"])
    assert set(found["loads"][0]["single"]) == {"1", "8", "64", "256"}
    text = (tmp_path / "gpu.md").read_text()
    assert "| device | the CPU |" in text
    assert "not measured" in text  # what a smoke run leaves out is not made up


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_a_card_it_says_so() -> None:
    result = CliRunner().invoke(main, ["--quick"])
    assert result.exit_code == 1
    assert "torch sees no CUDA device; --device cpu shows that all works" in result.output
