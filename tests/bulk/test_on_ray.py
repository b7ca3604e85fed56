# SPDX-License-Identifier: Apache-2.0
"""On a real Ray cluster of several nodes: whoever dies, all rows are there once."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest

from arrowhead_bulk.errors import BadModel, Stalled
from arrowhead_bulk.job import Wish, planned
from arrowhead_bulk.progress import Progress
from arrowhead_bulk.vectors import Model

from .conftest import texts, vectors_of, write_parquet
from .test_job import DRIVER, run

ray = pytest.importorskip("ray")
ROWS = 2000


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


@pytest.mark.timeout(600)
def test_a_job_that_does_nothing_ends_and_goes_on(
    wish: Callable[..., Wish], source: Path, small_units: int, tmp_path: Path
) -> None:
    from arrowhead_bulk.on_ray import Cluster, run_on_ray

    model = replace(wish(source).model, threads=999)  # no node has as many CPUs
    told = pytest.raises(Stalled, match=r"no row was embedded for 5 s.*run the same command")
    with planned(wish(source, model=model)) as job, told:
        run_on_ray(job, Cluster(stall_s=5.0), Progress(ROWS, 9, False))
    assert run(wish(source))["rows"] == ROWS


@pytest.mark.timeout(600)
def test_a_workers_error_is_told_as_it_is(
    wish: Callable[..., Wish], source: Path, tmp_path: Path
) -> None:
    from arrowhead_bulk.on_ray import Cluster, run_on_ray

    with planned(wish(source)) as job:
        job.task = replace(job.task, model=Model("minilm", str(tmp_path / "away"), 1))
        with pytest.raises(BadModel, match=r"cannot be opened"):
            run_on_ray(job, Cluster(), Progress(ROWS, 1, False))
