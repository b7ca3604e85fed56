# SPDX-License-Identifier: Apache-2.0
"""`arrowhead serve` on the real model: it refuses spoiled weights and survives its own death."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from arrowhead_client import Client
from arrowhead_engine.weightfile import WeightFile
from arrowhead_engine.weightwriter import write
from arrowhead_server.address import free_address
from arrowhead_server.supervisor import running_server


@pytest.fixture
def repository(minilm_repository: Path, tmp_path: Path) -> Path:
    """A copy of the repository, to be spoiled."""
    return shutil.copytree(minilm_repository, tmp_path / "a name with blanks, é" / "models")


def test_any_path_is_served_and_an_unfinished_model_hinders_nobody(repository: Path) -> None:
    (repository / "half_encoder" / ".staging").mkdir(parents=True)
    with running_server(repository) as server, Client(server.grpc_url) as client:
        assert client.embed("hello").shape == (384,)


def flip_one_bit(path: Path) -> None:
    info = WeightFile.open(path).tensors["encoder.layer.3.intermediate.dense.weight"]
    assert info.offset is not None
    with path.open("r+b") as file:
        file.seek(info.offset + 12_345)
        (byte,) = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def other_weights(path: Path) -> None:
    """Sound checksums over other weights: the certificate tells."""
    with WeightFile.open(path) as weights:
        tensors = list(weights.stream())
        last = tensors[-1]
        tensors[-1] = last._replace(data=np.full(last.shape, 0.5, np.float16).tobytes())
        write(path, tensors, weights.metadata)


def cut_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (flip_one_bit, "encoder.layer.3.intermediate.dense.weight: its bytes have CRC-32"),
        (other_weights, "not the certified weights"),
        (cut_short, "bytes, and the end is missing"),
    ],
)
def test_spoiled_weights_are_never_served(
    repository: Path, spoil: Callable[[Path], None], message: str
) -> None:
    spoil(repository / "minilm_encoder" / "1" / "weights.parquet")
    address = free_address()
    result = subprocess.run(
        [
            *(sys.executable, "-m", "arrowhead_client.cli", "serve"),
            *("--repository", str(repository)),
            *("--http-port", str(address.http_port), "--grpc-port", str(address.grpc_port)),
            *("--metrics-port", str(address.metrics_port)),
            *("--health-port", str(address.health_port)),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 1
    assert result.stdout == ""
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("arrowhead: ")
    assert "minilm_encoder" in line
    assert message in line


@pytest.mark.parametrize("part", ["minilm_encoder", "minilm_tokenizer"])
def test_a_killed_stub_costs_a_patient_client_nothing(
    minilm_repository: Path, part: str, measured: Callable[..., None]
) -> None:
    """Clients embed without pause while a stub is killed: all succeed, every vector is right."""
    texts = [f"a text under load, number {i}" for i in range(40)]
    done = threading.Event()
    answered: list[float] = []
    failures: list[BaseException] = []

    with running_server(minilm_repository) as server:
        with Client(server.grpc_url) as client:
            wanted = client.embed(texts)

        def load(url: str) -> None:
            rng = np.random.default_rng()
            # More patience than the default 9 s, for a machine busy with other things.
            with Client(url, retries=20, timeout_s=60) as client:
                while not done.is_set():
                    i = int(rng.integers(len(texts)))
                    # A new text each time, or the cache would answer for the dead.
                    vector = client.embed([texts[i], f"{rng.integers(1 << 62)}"])[0]
                    answered.append(time.monotonic())
                    if float(vector @ wanted[i]) < 0.9999:
                        raise AssertionError(f"a wrong vector for {texts[i]!r}")

        def guarded(url: str) -> None:
            try:
                load(url)
            except BaseException as error:  # noqa: BLE001  told by the test
                failures.append(error)

        threads = [
            threading.Thread(target=guarded, args=(url,))
            for url in (server.grpc_url, server.http_url) * 2
        ]
        for thread in threads:
            thread.start()
        try:
            _wait(lambda: len(answered) > 50)
            killed = time.monotonic()
            os.kill(server.stub_pids()[part][0], signal.SIGKILL)
            _wait(lambda: len(server.restarts) == 1)
            _wait(lambda: sum(at > killed + server.restarts[0].recovery_s for at in answered) > 100)
        finally:
            done.set()
            for thread in threads:
                thread.join(60)
        assert not failures
        gap = max(np.diff([at for at in answered if at > killed - 1]))
        measured("recovery", server.restarts[0].recovery_s)
        measured("longest time without an answer", gap)
        assert server.restarts[0].recovery_s < 30


def _wait(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
