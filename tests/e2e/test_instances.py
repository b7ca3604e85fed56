# SPDX-License-Identifier: Apache-2.0
"""Several processes of one encoder, `arrowhead configure NAME --instances 2`, and equal texts."""

from __future__ import annotations

import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest

from arrowhead_client import Client
from arrowhead_conversion import settings
from arrowhead_engine import compute
from arrowhead_server.supervisor import Server, running_server

from .conftest import wait_until

WHY_NOT = compute._not_native("cpu", "float32", plain=True)
# Appended to model.py: notes how many texts the engine is asked for, step by step.
COUNTING = """

_initialize = TritonPythonModel.initialize


def initialize(self, args):
    _initialize(self, args)
    engine = self.encoder._engine

    def counting(ids, skips):
        with open({file!r}, "a") as file:
            print(len(ids), file=file)
        return engine(ids, skips)

    self.encoder._engine = counting


TritonPythonModel.initialize = initialize
"""


@pytest.fixture(scope="module")
def pair(minilm_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    repository = tmp_path_factory.mktemp("pair") / "models"
    shutil.copytree(minilm_repository, repository)
    settings.set_compute_dtype(repository, "minilm", "float32")
    settings.set_instances(repository, "minilm", 2)
    with running_server(repository) as server:
        yield server


def shared(pid: int) -> dict[str, int]:
    """The shared files that a process maps, and its own part of their memory in bytes."""
    found: dict[str, int] = {}
    path = ""
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-", line):
            path = line.split(maxsplit=5)[-1] if "/shared/" in line else ""
        elif path and line.startswith("Pss:"):
            found[path] = found.get(path, 0) + int(line.split()[1]) * 1024
    return found


@pytest.mark.skipif(bool(WHY_NOT), reason=f"no native engine: {WHY_NOT}")
def test_they_share_what_they_laid_out(
    pair: Server, texts: list[str], wanted: np.ndarray, measured: Callable[..., None]
) -> None:
    one, other = pair.stub_pids()["minilm_encoder"]
    ((path, bytes_),) = shared(one).items()
    assert list(shared(other)) == [path]
    size = Path(path).stat().st_size
    assert 0.4 * size < bytes_ < 0.6 * size
    assert Path(path).parent.stat().st_mode & 0o777 == 0o700
    for pid in (one, other):
        measured("private", psutil.Process(pid).memory_full_info().uss / 1e6, "MB")
    with ThreadPoolExecutor(4) as pool, Client(pair.grpc_url, batch_size=1) as client:
        # Each goes to whichever is free.
        for met in pool.map(lambda _: client.embed(texts), range(4)):
            assert (met * wanted).sum(1).min() > 0.9999


@pytest.mark.skipif(bool(WHY_NOT), reason=f"no native engine: {WHY_NOT}")
def test_after_a_crash_they_find_it_again(pair: Server) -> None:
    pids = pair.stub_pids()["minilm_encoder"]
    (path,) = shared(pids[0])
    made = Path(path).stat().st_ino
    before = len(pair.restarts)
    os.kill(pids[0], signal.SIGKILL)
    wait_until(lambda: len(pair.restarts) > before, "the restart")
    for pid in pair.stub_pids()["minilm_encoder"]:
        assert list(shared(pid)) == [path]
    assert Path(path).stat().st_ino == made


def test_what_many_ask_at_once_is_computed_once(minilm_repository: Path, tmp_path: Path) -> None:
    repository = shutil.copytree(minilm_repository, tmp_path / "models")
    noted = tmp_path / "computed"
    with (repository / "minilm_encoder" / "1" / "model.py").open("a") as model:
        model.write(COUNTING.format(file=str(noted)))
    callers = 32
    with (
        running_server(repository, probe_interval_s=600) as server,
        ThreadPoolExecutor(callers) as pool,
        Client(server.grpc_url, concurrency=callers) as client,
    ):
        for number in range(5):
            text = f"number {number} " + "is long enough to be met while it is computed " * 20
            noted.write_text("")
            met = list(pool.map(client.embed, [text] * callers))
            assert all(np.array_equal(vector, met[0]) for vector in met)
            assert noted.read_text().split() == ["1"]
