# SPDX-License-Identifier: Apache-2.0
"""A corpus is embedded by several Tritons, behind HAProxy."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from deploy.stack import Stack
from perf.quality import engine_vectors
from tests.bulk.conftest import texts, vectors_of, write_parquet
from tests.bulk.test_job import DRIVER

from .conftest import successes_in, wait_until

ROWS = 3000


@pytest.mark.timeout(300)
@pytest.mark.parametrize("engine", ["--no-ray", "--ray"])
def test_a_triton_that_is_killed_costs_a_job_nothing(
    stack: Stack, minilm_repository: Path, tmp_path: Path, engine: str
) -> None:
    rows = texts(ROWS, f"{engine}, of a fleet,")
    source, out = write_parquet(tmp_path / "in.parquet", rows), tmp_path / "vectors"
    before = {name: successes_in(stack, name, "minilm_encoder") for name in stack.tritons}
    command = [
        sys.executable, "-c", DRIVER, "bulk", "embed", str(source), engine, "--json",
        f"--endpoint={stack.grpc_url}", f"--out={out}",
    ]  # fmt: skip
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as job:
        wait_until(
            lambda: all(
                successes_in(stack, name, "minilm_encoder") > before[name] for name in stack.tritons
            ),
            "all Tritons to be asked",
        )
        stack.kill("triton1", signal.SIGKILL)
        assert job.poll() is None, job.communicate()
        told, error = job.communicate(timeout=200)
    assert job.returncode == 0, error
    assert json.loads(told)["rows"] == ROWS
    found = vectors_of(out)
    assert found["id"].to_pylist() == list(range(ROWS))
    some = slice(None, None, 100)
    vectors = np.stack(found["embedding"].to_numpy())[some]
    assert (vectors * engine_vectors(minilm_repository, 1, rows[some])).sum(axis=1).min() > 0.9999
    wait_until(lambda: stack.is_ready("haproxy"), "triton1 to be back")
