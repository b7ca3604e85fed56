# SPDX-License-Identifier: Apache-2.0
"""The real MiniLM, signed: the bytes that were checked are those that are served."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from arrowhead_client import Client
from arrowhead_conversion import signing
from arrowhead_server.address import free_address
from arrowhead_server.supervisor import running_server


@pytest.fixture
def repository(minilm_repository: Path, tmp_path: Path) -> Path:
    return shutil.copytree(minilm_repository, tmp_path / "models")


def serve(repository: Path, public_key: Path) -> subprocess.CompletedProcess[str]:
    """`arrowhead serve`, told of the key as a container is; for what it refuses."""
    address = free_address()
    return subprocess.run(
        [
            *(sys.executable, "-m", "arrowhead_client.cli", "serve"),
            *("--repository", repository, "--http-port", str(address.http_port)),
            *("--grpc-port", str(address.grpc_port), "--metrics-port", str(address.metrics_port)),
            *("--health-port", str(address.health_port)),
        ],
        env={**os.environ, "ARROWHEAD_PUBLIC_KEY": str(public_key)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_checked_bytes_are_served_whatever_becomes_of_the_files(
    repository: Path, tmp_path: Path, wanted: npt.NDArray[np.float32], texts: list[str]
) -> None:
    public_key = signing.new_key(tmp_path / "release.pem")
    weights = repository / "minilm_encoder" / "1" / "weights.parquet"
    refused = serve(repository, public_key)
    assert refused.returncode == 1
    assert refused.stderr.startswith("arrowhead: minilm version 1 is not signed")
    assert refused.stderr.count("\n") == 1

    signing.sign(repository, "minilm", 1, tmp_path / "release.pem")
    with (
        running_server(repository, public_key=public_key) as server,
        Client(server.http_url) as client,
    ):
        pid = server.stub_pids()["minilm_encoder"][0]
        mapped = Path(f"/proc/{pid}/maps").read_text()
        assert "/signed/minilm-1-" in mapped
        assert str(weights) not in mapped
        with weights.open("r+b") as file:  # into the file that a link would have mapped
            file.seek(1 << 20)
            file.write(bytes(1 << 20))
        np.testing.assert_allclose(client.embed(texts), wanted, atol=1e-5)

    refused = serve(repository, public_key)
    assert refused.returncode == 1
    assert f"{weights} is not the file that was signed" in refused.stderr
    assert refused.stderr.count("\n") == 1
