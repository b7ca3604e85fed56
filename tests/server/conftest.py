# SPDX-License-Identifier: Apache-2.0
"""A toy repository with the real tensor contract, and the few things every test here does."""

import http.client
import json
import os
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from arrowhead_server.address import Address
from arrowhead_server.supervisor import Server, running_server

DIMENSION = 8
PARTS = ("", "_tokenizer", "_encoder")  # ends of the names of a model's folders

ENSEMBLE = """
name: "toy"
platform: "ensemble"
max_batch_size: 100
input [ { name: "text" data_type: TYPE_STRING dims: [ 1 ] } ]
output [ { name: "embeddings" data_type: TYPE_FP32 dims: [ 8 ] } ]  # DIMENSION
response_cache { enable: true }
ensemble_scheduling {
  step [
    {
      model_name: "toy_tokenizer" model_version: -1
      input_map { key: "text" value: "text" }
      output_map { key: "input_ids" value: "input_ids" }
      output_map { key: "length" value: "length" }
    },
    {
      model_name: "toy_encoder" model_version: -1
      input_map { key: "input_ids" value: "input_ids" }
      input_map { key: "length" value: "length" }
      output_map { key: "embeddings" value: "embeddings" }
    }
  ]
}
"""
TOKENIZER = """
name: "toy_tokenizer"
backend: "python"
max_batch_size: 100
input [ { name: "text" data_type: TYPE_STRING dims: [ 1 ] } ]
output [
  { name: "input_ids" data_type: TYPE_INT32 dims: [ -1 ] },
  { name: "length" data_type: TYPE_INT32 dims: [ 1 ] },
  { name: "truncated" data_type: TYPE_BOOL dims: [ 1 ] }
]
instance_group [ { kind: KIND_CPU count: 1 } ]
"""
ENCODER = """
name: "toy_encoder"
backend: "python"
max_batch_size: 100
input [
  { name: "input_ids" data_type: TYPE_INT32 dims: [ -1 ] allow_ragged_batch: true },
  { name: "length" data_type: TYPE_INT32 dims: [ 1 ] }
]
output [ { name: "embeddings" data_type: TYPE_FP32 dims: [ 8 ] } ]
instance_group [ { kind: KIND_CPU count: 1 } ]
"""
# The bytes of the text are its ids; the vector is their sum, eight times.
TOKENIZER_PY = """
import numpy as np
import triton_python_backend_utils as pb


class TritonPythonModel:
    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        texts = pb.get_input_tensor_by_name(request, "text").as_numpy().reshape(-1)
        length = np.array([[len(text)] for text in texts], np.int32)
        ids = np.zeros((len(texts), length.max()), np.int32)
        for row, text in zip(ids, texts):
            row[: len(text)] = list(text)
        return pb.InferenceResponse([
            pb.Tensor("input_ids", ids),
            pb.Tensor("length", length),
            pb.Tensor("truncated", np.zeros((len(texts), 1), bool)),
        ])
"""
ENCODER_PY = """
import os
import time

import numpy as np
import triton_python_backend_utils as pb


class TritonPythonModel:
    def initialize(self, args):
        {on_load}

    def execute(self, requests):
        {on_execute}
        return [self.answer(request) for request in requests]

    def answer(self, request):
        ids = pb.get_input_tensor_by_name(request, "input_ids").as_numpy()
        vectors = np.repeat(ids.sum(axis=1, keepdims=True).astype(np.float32), 8, axis=1)
        return pb.InferenceResponse([pb.Tensor("embeddings", vectors)])
"""


def write_repository(
    folder: Path, *, on_load: str = "pass", on_execute: str = "pass", weights: bool = True
) -> Path:
    for name, config, code in (
        ("toy", ENSEMBLE, None),
        ("toy_tokenizer", TOKENIZER, TOKENIZER_PY),
        (
            "toy_encoder",
            ENCODER,
            ENCODER_PY.format(
                on_load=textwrap.indent(on_load, " " * 8).strip(),
                on_execute=textwrap.indent(on_execute, " " * 8).strip(),
            ),
        ),
    ):
        (folder / name / "1").mkdir(parents=True)
        (folder / name / "config.pbtxt").write_text(config)
        if code is not None:
            (folder / name / "1" / "model.py").write_text(code)
    if weights:
        (folder / "toy_encoder" / "1" / "weights.parquet").touch()
    return folder


def write_version(repository: Path, version: int, code: str, tokenizer: str = "") -> None:
    """A version whose vectors are `code`; it is not named yet."""
    for part in PARTS:
        source, target = repository / f"toy{part}" / "1", repository / f"toy{part}" / f"{version}"
        shutil.copytree(source, target, dirs_exist_ok=True)
    path = repository / "toy_encoder" / f"{version}" / "model.py"
    path.write_text(path.read_text().replace("ids.sum", code))
    if tokenizer:
        (repository / "toy_tokenizer" / f"{version}" / "model.py").write_text(tokenizer)


def pin(repository: Path, version: int, name: str = "toy") -> None:
    """Names the version that is to be live, in a file that is replaced whole."""
    path = repository / name / "config.pbtxt"
    words = path.read_text().split("model_version: ")
    text = "".join(
        [words[0], *(f"model_version: {version}\n" + w.split("\n", 1)[1] for w in words[1:])]
    )
    draft = path.with_name(".draft")
    draft.write_text(text)
    draft.replace(path)


@pytest.fixture
def make_repository(tmp_path: Path) -> Callable[..., Path]:
    def make(**options: Any) -> Path:
        return write_repository(tmp_path / "models", **options)

    return make


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for the tests that only ask it things."""
    repository = write_repository(tmp_path_factory.mktemp("shared") / "models")
    with running_server(repository) as server:
        yield server


def ask(port: int, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        text = None if body is None else json.dumps(body)
        connection.request(method, path, text, {"Connection": "close", **headers})
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


def embed_status(address: Address, text: str) -> tuple[int, Any]:
    """Status and first number of the vector, or the error text."""
    tensor = {"name": "text", "shape": [1, 1], "datatype": "BYTES", "data": [text]}
    status, body = ask(address.http_port, "POST", "/v2/models/toy/infer", {"inputs": [tensor]})
    answer = json.loads(body)
    return status, answer["outputs"][0]["data"][0] if status == 200 else answer["error"]


def wait_until(condition: Callable[[], Any], what: str, timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s} s for: {what}"
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def shared_memory(prefix: str) -> list[str]:
    return [name for name in os.listdir("/dev/shm") if name.startswith(prefix)]  # noqa: S108, PTH208


class Tools:
    """What the tests share. A fixture, because test modules cannot import each other."""

    ask = staticmethod(ask)
    embed = staticmethod(embed_status)
    wait_until = staticmethod(wait_until)
    is_alive = staticmethod(is_alive)
    shared_memory = staticmethod(shared_memory)


@pytest.fixture
def tools() -> type[Tools]:
    return Tools


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts `arrowhead serve` as a process of its own; kills what a failed test left running."""
    started: list[subprocess.Popen[str]] = []

    def start(repository: Path, address: Address, *options: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "arrowhead_client.cli", "serve"),
                *("--repository", str(repository)),
                *("--http-port", str(address.http_port)),
                *("--grpc-port", str(address.grpc_port)),
                *("--metrics-port", str(address.metrics_port)),
                *("--health-port", str(address.health_port)),
                *options,
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "TMPDIR": str(tmp_path)},
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()
