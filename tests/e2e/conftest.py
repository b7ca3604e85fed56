# SPDX-License-Identifier: Apache-2.0
"""A real Triton serving the real MiniLM, started once for the tests that only ask it things."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import pytest

from arrowhead_client import Client
from arrowhead_server.supervisor import Server, running_server
from deploy.stack import Stack
from perf.quality import engine_vectors

from . import stacks

# One table of texts for every road.
TEXTS = [
    "A man is playing a guitar.",
    "a",
    "",
    "naïve café, Straße, e\u0301",
    "快速的棕色狐狸 и быстрая лиса",
    "🙂🚀 emoji \u200d joiner",
    'quotes " and \\ backslashes \n new lines \t tabs',
    "control \x00 \x01 characters",
    "[CLS] literal special tokens [SEP]",
    "word " * 100,
    "a text whose end is cut off " * 100,
]


@pytest.fixture(scope="session")
def server(minilm_repository: Path) -> Iterator[Server]:
    with running_server(minilm_repository) as server:
        yield server


# Added to minilm's configuration, as its owner may.
PARAMETERS = """
parameters { key: "prompt.query" value { string_value: "query: " } }
parameters { key: "prompt.quoted \\"ß\\"" value { string_value: "two\\nlines: " } }
parameters { key: "prompt.nothing" value { string_value: "" } }
parameters { key: "another" value { string_value: "not a prompt" } }
"""


@pytest.fixture(scope="session")
def prompted(minilm_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """MiniLM, given prompts it was not trained with."""
    repository = tmp_path_factory.mktemp("prompted") / "model_repository"
    shutil.copytree(minilm_repository, repository)
    with (repository / "minilm" / "config.pbtxt").open("a", encoding="utf-8") as config:
        config.write(PARAMETERS)
    with running_server(repository) as server:
        yield server


@pytest.fixture(scope="session")
def client(server: Server) -> Iterator[Client]:
    with Client(server.grpc_url) as client:
        yield client


@pytest.fixture(scope="session")
def stack(minilm_repository: Path) -> Iterator[Stack]:
    """Three Tritons and two gateways behind HAProxy. Who breaks something mends it."""
    with stacks.started(minilm_repository) as stack:
        yield stack


@pytest.fixture(scope="session")
def wanted(minilm_repository: Path) -> npt.NDArray[np.float32]:
    """The vectors of `TEXTS`, by the engine in this process."""
    return engine_vectors(minilm_repository, 1, TEXTS)


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return TEXTS


def wait_until(condition: Callable[[], Any], what: str, timeout_s: float = 60.0) -> None:
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < timeout_s, f"waited {timeout_s} s for: {what}"
        time.sleep(0.05)


def successes(metrics_url: str, model: str) -> int:
    """How many requests for a model, of all its versions, a Triton has answered."""
    metrics = httpx.get(metrics_url).text
    found = re.findall(rf'^nv_inference_request_success{{model="{model}",\S+ (\d+)', metrics, re.M)
    assert found, metrics
    return sum(map(int, found))


def successes_in(stack: Stack, name: str, model: str) -> int:
    """The same of a Triton of a stack."""
    return successes(f"http://{stack.address(name)}:8002/metrics", model)
