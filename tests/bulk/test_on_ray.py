# SPDX-License-Identifier: Apache-2.0
"""On a real Ray cluster of several nodes: whoever dies, all rows are there once."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest

from arrowhead_bulk.errors import BulkError
from arrowhead_bulk.job import Wish
from arrowhead_bulk.vectors import Model

from .conftest import texts, vectors_of, write_parquet
from .test_job import DRIVER, run

ray = pytest.importorskip("ray")
ROWS = 2000
# A thread that asks Ray for something while it is shut down ends the process, and nothing is told.
WITHOUT_THREADS = """
import threading
from arrowhead_bulk.on_ray import ray
ends = ray.shutdown
def shutdown():
    names = [thread.name for thread in threading.enumerate()]
    assert not any(name == "units" or "StreamingExecutor" in name for name in names), names
    ends()
ray.shutdown = shutdown
"""


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> Iterator[None]:
    """Ray's own threads warn of much that is none of ours."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        yield


@pytest.fixture
def cluster() -> Iterator[object]:
    """A head and two more nodes, as processes of this machine."""
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    made.add_node(num_cpus=1)
    made.add_node(num_cpus=1)
    made.wait_for_nodes()
    yield made
    made.shutdown()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_parquet(tmp_path / "in.parquet", texts(ROWS, "of several nodes"))


@pytest.fixture
def driver(
    cluster: object, source: Path, minilm_repository: Path, tmp_path: Path
) -> Callable[[], subprocess.Popen[str]]:
    def start() -> subprocess.Popen[str]:
        arguments = [
            sys.executable, "-c", DRIVER, "bulk", "embed", str(source), "--json",
            f"--ray-address={cluster.address}", f"--out={tmp_path / 'vectors'}",  # type: ignore[attr-defined]
            f"--repository={minilm_repository}", "--stall-after=120",
        ]  # fmt: skip
        return subprocess.Popen(
            arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    return start


def wait_for_parts(staging: Path, count: int, process: subprocess.Popen[str]) -> None:
    ends = time.monotonic() + 120
    while len(list(staging.glob("part-*"))) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < ends, "no parts"
        time.sleep(0.02)


def actors() -> list[psutil.Process]:
    """Those of this process' cluster that embed."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if any("MapWorker" in word for word in process.cmdline()):
                found.append(process)
    return found


def whole(process: subprocess.Popen[str], tmp_path: Path) -> dict[str, int]:
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert vectors_of(tmp_path / "vectors")["id"].to_pylist() == list(range(ROWS))
    assert not (tmp_path / ".vectors.staging").exists()
    told: dict[str, int] = json.loads(out)
    assert told["rows"] == ROWS
    return told


def test_who_gets_what() -> None:
    from arrowhead_bulk.on_ray import Pool

    cpus, gpus = [{"CPU": 8.0, "memory": 1e9}] * 2, [{"CPU": 16.0, "GPU": 2.0}]

    def pool(nodes: Any, wanted: int = 0, units: int = 99, **model: Any) -> Pool:
        return Pool.of(nodes, Model("minilm", **model), wanted, units)

    assert pool(cpus)[:4] == (16, 1, 0.95, 0)
    assert pool(cpus, threads=4)[:4] == (4, 4, 3.95, 0)
    assert pool(cpus, threads=99).workers == 1
    assert pool(cpus, wanted=3, units=2).workers == 2
    assert pool(gpus) == (2, 8, 0.95, 1, 2)
    assert pool(gpus, wanted=1, threads=3) == (1, 3, 0.95, 1, 2)
    # Cores of nodes without a GPU are nothing to those with one, and a few may be too few.
    assert pool([*gpus, {"CPU": 128.0}]) == pool(gpus)
    assert pool([{"CPU": 4.0, "GPU": 8.0}]) == (8, 1, 0.45, 1, 8)
    assert pool([{"GPU": 1.0}]) == (1, 1, 0.0, 1, 1)
    # One that comes when it is asked for.
    assert pool(cpus, device="cuda") == (1, 1, 0.95, 1, 0)
    assert pool(gpus, device="cpu") == pool(cpus)
    assert pool(gpus, endpoint="grpc://tritons:8001") == pool(cpus)
    with pytest.raises(
        BulkError, match=r"--device cuda:1: on Ray each worker gets a GPU .* or --no-ray"
    ):
        pool(gpus, device="cuda:1")


@pytest.mark.timeout(600)
def test_it_gives_what_one_process_gives(
    driver: Callable[[], subprocess.Popen[str]], wish: Callable[..., Wish], source: Path,
    tmp_path: Path, measured: Callable[..., None],
) -> None:  # fmt: skip
    began = time.monotonic()
    told = whole(driver(), tmp_path)
    measured("took", time.monotonic() - began)
    assert told["workers"]["nodes"] == 3  # type: ignore[index]
    run(wish(source, out="alone"))
    ours, alone = vectors_of(tmp_path / "vectors"), vectors_of(tmp_path / "alone")
    for name in ("id", "tokens", "truncated"):
        assert ours[name].equals(alone[name])
    a, b = (np.stack(table["embedding"].to_numpy()) for table in (ours, alone))
    assert np.abs(a - b).max() < 2e-3


@pytest.mark.timeout(600)
def test_a_killed_actor_loses_nothing(
    driver: Callable[[], subprocess.Popen[str]], tmp_path: Path
) -> None:
    process = driver()
    for count in (2, 6, 10):
        wait_for_parts(tmp_path / ".vectors.staging", count, process)
        victims = actors()
        assert victims
        victims[0].kill()
    whole(process, tmp_path)


@pytest.mark.timeout(600)
def test_a_killed_node_loses_nothing(
    cluster: object, driver: Callable[[], subprocess.Popen[str]], tmp_path: Path
) -> None:
    process = driver()
    wait_for_parts(tmp_path / ".vectors.staging", 4, process)
    for node in list(cluster.worker_nodes)[:2]:  # type: ignore[attr-defined]
        cluster.remove_node(node, allow_graceful=False)  # type: ignore[attr-defined]
    whole(process, tmp_path)


@pytest.mark.timeout(600)
def test_a_killed_driver_is_gone_on_with(
    driver: Callable[[], subprocess.Popen[str]], tmp_path: Path
) -> None:
    staging = tmp_path / ".vectors.staging"
    process = driver()
    wait_for_parts(staging, 4, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "vectors").exists()
    for part in staging.glob("part-*"):
        pq.read_metadata(part)
    assert whole(driver(), tmp_path)["parts_of_before"] >= 4


def command(source: Path, repository: Path, out: Path, *more: str) -> tuple[int, str]:
    """What it ends with, and what it says, on a cluster of its own."""
    arguments = [
        sys.executable, "-c", WITHOUT_THREADS + DRIVER, "bulk", "embed", str(source), "--ray",
        f"--out={out}", f"--repository={repository}", *more,
    ]  # fmt: skip
    run = subprocess.run(arguments, capture_output=True, text=True, timeout=240)
    return run.returncode, run.stderr


@pytest.mark.timeout(600)
def test_a_job_that_does_nothing_ends_and_goes_on(
    source: Path, minilm_repository: Path, tmp_path: Path
) -> None:
    out = tmp_path / "vectors"
    no_node_has_so_many = ("--threads=999", "--stall-after=8")
    code, told = command(source, minilm_repository, out, *no_node_has_so_many)
    assert code == 1
    assert "arrowhead: no row was embedded for 8 s" in told
    assert not out.exists()
    assert command(source, minilm_repository, out)[0] == 0
    assert vectors_of(out)["id"].to_pylist() == list(range(ROWS))


@pytest.mark.timeout(600)
def test_a_workers_error_is_told_as_it_is(
    source: Path, minilm_repository: Path, tmp_path: Path
) -> None:
    repository = shutil.copytree(minilm_repository, tmp_path / "models")
    weights = repository / "minilm_encoder" / "1" / "weights.parquet"
    weights.write_bytes(weights.read_bytes()[:-1])
    code, told = command(source, repository, tmp_path / "vectors")
    assert code == 1
    assert "arrowhead: model 'minilm' cannot be opened" in told
    assert not (tmp_path / "vectors").exists()
