# SPDX-License-Identifier: Apache-2.0
"""A repository that the first release wrote, its own model.py included, served by this one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from arrowhead_client import Client
from arrowhead_conversion import registry
from arrowhead_engine.spec import info, read_metadata
from arrowhead_server.supervisor import running_server

from .conftest import wait_until

GOLDEN = Path(__file__).parents[1] / "data" / "golden"


@pytest.mark.parametrize("written", sorted(GOLDEN.glob("version-*")), ids=lambda path: path.name)
def test_every_version_of_a_golden_repository_is_served(written: Path, tmp_path: Path) -> None:
    repository = shutil.copytree(written / "repository", tmp_path / "repository")
    expected = json.loads((written / "expected.json").read_text(encoding="utf-8"))
    with running_server(repository) as server, Client(server.http_url, model="golden") as client:
        for version, wanted in expected["versions"].items():
            registry.promote(repository, "golden", int(version))
            metadata = repository / "golden_encoder" / version / "metadata.json"
            fingerprint = info(read_metadata(metadata))["fingerprint"]
            wait_until(
                lambda fingerprint=fingerprint: client.info().fingerprint == fingerprint,
                f"version {version}",
            )
            vectors = np.array(wanted["vectors"], np.float32)
            met = client.embed(expected["texts"])
            assert (met * vectors).sum(axis=1).min() > 0.999
            assert client.count_tokens(expected["texts"]).length.tolist() == wanted["length"]
        assert server.restarts == []
