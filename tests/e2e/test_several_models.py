# SPDX-License-Identifier: Apache-2.0
"""Models of several kinds served together; one that comes, and goes, while the others serve."""

from __future__ import annotations

import re
import shutil
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import psutil
import pytest
import torch

from arrowhead_client import Client
from arrowhead_conversion import registry
from arrowhead_conversion.convert import convert
from arrowhead_server.supervisor import Server, running_server
from perf import random_models

from .conftest import wait_until

TEXTS = ["a short text", "", "another one, which is longer and is cut off at the limit " * 20]
# One that has a file in the engine, and one through transformers' own module.
KINDS = {"mpnet": "mean", "qwen3": "lasttoken"}


@pytest.fixture(scope="module")
def sources(minilm_source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sources")
    return {
        kind: random_models.make(folder / kind, minilm_source, kind, pooling=pooling)
        for kind, pooling in KINDS.items()
    }


@pytest.fixture
def repository(minilm_repository: Path, tmp_path: Path) -> Path:
    return shutil.copytree(minilm_repository, tmp_path / "models")


@pytest.fixture
def server(repository: Path) -> Iterator[Server]:
    with running_server(repository) as server:
        yield server


def reference(source: Path, texts: Sequence[str]) -> npt.NDArray[np.float32]:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(
        str(source), device="cpu", local_files_only=True, model_kwargs={"dtype": torch.float32}
    )
    vectors: npt.NDArray[np.float32] = model.encode(list(texts), batch_size=1)
    return vectors


def embeds(server: Server, model: str) -> npt.NDArray[np.float32]:
    with Client(server.grpc_url, model=model) as client:
        return client.embed(TEXTS)


def is_ready(server: Server, model: str) -> bool:
    with Client(server.http_url, model=model) as client:
        return client.ready()


def private_mb(server: Server) -> float:
    processes = [psutil.Process(server.pid), *psutil.Process(server.pid).children()]
    return sum(process.memory_full_info().uss for process in processes) / 1e6


def counts(server: Server) -> dict[str, float]:
    """Successful requests by model."""
    with urllib.request.urlopen(server.metrics_url) as page:  # noqa: S310 (loopback)
        text = page.read().decode()
    found = re.findall(r'^nv_inference_request_success{model="([^"]+)",\S+ (\d+)', text, re.M)
    return {model: float(count) for model, count in found}


def test_models_come_and_go_beside_minilm(
    repository: Path, server: Server, sources: dict[str, Path], measured: Callable[..., None]
) -> None:
    alone, minilm = private_mb(server), embeds(server, "minilm")
    for kind, source in sources.items():
        convert(str(source), kind, repository, progress=False)
        began = time.monotonic()
        wait_until(lambda kind=kind: is_ready(server, kind), kind)
        measured(f"{kind} served after", time.monotonic() - began)
        met, wanted = embeds(server, kind), reference(source, TEXTS)
        assert (met * wanted).sum(1).min() > 0.9999
    together = private_mb(server)
    measured("three models take", together, "MB")

    before = counts(server)
    with Client(server.grpc_url, model="mpnet") as client:
        for number in range(7):
            client.embed(f"for mpnet alone {number}")
    # Triton counts a request a moment after it was answered.
    wait_until(lambda: counts(server)["mpnet"] - before["mpnet"] >= 7, "the counts")
    after = counts(server)
    assert after["mpnet"] - before["mpnet"] == 7
    assert after["minilm"] == before["minilm"]
    assert after["qwen3"] == before["qwen3"]

    pids = [pid for kind in KINDS for pid in server.stub_pids()[f"{kind}_encoder"]]
    assert len(pids) == 2
    for kind in KINDS:
        registry.remove(repository, kind)
        wait_until(lambda kind=kind: not is_ready(server, kind), f"{kind} to go")
    wait_until(lambda: not any(map(psutil.pid_exists, pids)), "the end of their processes")
    measured("two of them freed", together - private_mb(server), "MB")
    assert private_mb(server) < alone + 0.2 * (together - alone)
    np.testing.assert_allclose(embeds(server, "minilm"), minilm, atol=1e-6)
    assert {model.name for model in server.models} == {"minilm"}
    assert server.restarts == []
