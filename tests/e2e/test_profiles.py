# SPDX-License-Identifier: Apache-2.0
"""The other ways to serve a model: in one step, and in int8."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpc
from tritonclient.utils import InferenceServerException

from arrowhead_client import Client
from arrowhead_conversion import settings
from arrowhead_engine import compute
from arrowhead_server.supervisor import Server, running_server

DTYPE = "float32" if compute._not_native("cpu", "int8", plain=True) else "int8"
LEAST = {"float32": 0.99999, "int8": 0.995}


@pytest.fixture(scope="module")
def fused(
    minilm_repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Server, grpc.InferenceServerClient]]:
    repository = tmp_path_factory.mktemp("fused") / "models"
    shutil.copytree(minilm_repository, repository)
    settings.set_steps(repository, "minilm", "fused")
    settings.set_compute_dtype(repository, "minilm", DTYPE)
    with running_server(repository) as server:
        client = grpc.InferenceServerClient(server.grpc_url.split("://")[1])
        yield server, client
        client.close()


def tensor(name: str, values: Any, datatype: str) -> Any:
    array = np.array(values, object if datatype == "BYTES" else np.int32)
    made = grpc.InferInput(name, array.shape, datatype)
    made.set_data_from_numpy(array)
    return made


def counts(server: Server, model: str) -> tuple[int, int]:
    """Texts, and executions, that a model was given."""
    with grpc.InferenceServerClient(server.grpc_url.split("://")[1]) as client:
        (found,) = client.get_inference_statistics(model).model_stats
        return found.inference_count, found.execution_count


def test_the_vectors_are_the_models(fused: Any, texts: list[str], wanted: np.ndarray) -> None:
    server, _ = fused
    before = counts(server, "minilm_tokenizer")
    with Client(server.grpc_url) as client:
        met = client.embed(texts)
        alone = np.concatenate([client.embed([text]) for text in texts])
        assert client.count_tokens(["a b c"]).length.tolist() == [5]
    assert (met * wanted).sum(1).min() >= LEAST[DTYPE]
    np.testing.assert_allclose(alone, met, atol=1e-6)
    assert counts(server, "minilm_tokenizer")[0] == before[0] + 1  # asked for the count alone


def test_a_bad_text_costs_its_neighbours_nothing(fused: Any) -> None:
    server, client = fused
    good = [f"neighbour number {i}" for i in range(24)]

    def ask(value: bytes) -> Any:
        return client.infer("minilm", [tensor("text", [[value]], "BYTES")])

    before = counts(server, "minilm_encoder")
    with ThreadPoolExecutor(32) as pool:
        answers = [pool.submit(ask, text.encode()) for text in good]
        bad = [pool.submit(ask, b"\xff\xfe") for _ in range(8)]
        for answer in answers:
            assert answer.result().as_numpy("embeddings").shape == (1, 384)
        for answer in bad:
            with pytest.raises(InferenceServerException, match="not UTF-8: byte 0 of 2") as caught:
                answer.result()
            assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"
    texts, executions = (
        b - a for a, b in zip(before, counts(server, "minilm_encoder"), strict=True)
    )
    assert texts == 32
    assert executions < 32  # they did share batches


@pytest.mark.parametrize(
    "names", [["text", "input_ids", "length"], ["input_ids"], ["text", "length"]]
)
def test_mixed_up_inputs_are_refused(fused: Any, names: list[str]) -> None:
    _, client = fused
    values = {
        "text": tensor("text", [[b"a"]], "BYTES"),
        "input_ids": tensor("input_ids", [[101, 102]], "INT32"),
        "length": tensor("length", [[2]], "INT32"),
    }
    with pytest.raises(InferenceServerException, match="wanted text, or input_ids and length"):
        client.infer("minilm_encoder", [values[name] for name in names])
    answer = client.infer("minilm_encoder", [values["input_ids"], values["length"]])
    assert answer.as_numpy("embeddings").shape == (1, 384)
