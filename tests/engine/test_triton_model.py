# SPDX-License-Identifier: Apache-2.0
"""The encoder's Triton model, without Triton: what cannot be embedded never reaches the kernels."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from arrowhead_conversion.repository import template

# Ids beyond MiniLM's vocabulary, and none at all for an empty text.
FOREIGN = {
    "version": "1.0",
    "added_tokens": [],
    "pre_tokenizer": {"type": "Whitespace"},
    "model": {"type": "WordLevel", "vocab": {"near": 5, "far": 10**9}, "unk_token": "near"},
}


class Tensor:
    def __init__(self, name: str, values: Any) -> None:
        self.name, self.as_numpy = (lambda: name), (lambda: values)


class Family:
    """Counters that nobody reads."""

    COUNTER = 0

    def __init__(self, **_: Any) -> None:
        pass

    def Metric(self, labels: dict[str, str]) -> Family:  # noqa: N802
        return self

    def increment(self, value: float) -> None:
        pass


class Error(str):
    INVALID_ARG = 3

    def __new__(cls, text: str, _code: int) -> Error:
        return super().__new__(cls, text)


@pytest.fixture
def repository(minilm_repository: Path, tmp_path: Path) -> Path:
    for part in ("_tokenizer", "_encoder"):
        shutil.copytree(minilm_repository / f"minilm{part}", tmp_path / f"minilm{part}")
    return tmp_path


def arguments(repository: Path) -> dict[str, str]:
    """What Triton gives a model of that repository when it loads it."""
    config = {
        "parameters": {"compute_dtype": {"string_value": "float32"}},
        "instance_group": [{"count": 1}],
    }
    return {
        "model_config": json.dumps(config),
        "model_repository": str(repository / "minilm_encoder"),
        "model_version": "1",
        "model_name": "minilm_encoder",
        "model_instance_name": "minilm_encoder_0_0",
        "model_instance_kind": "CPU",
        "model_instance_device_id": "0",
    }


@pytest.fixture
def model(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    backend: Any = ModuleType("triton_python_backend_utils")
    backend.Tensor, backend.TritonError = Tensor, Error
    backend.MetricFamily = Family
    backend.InferenceResponse = lambda outputs=None, error=None: error or outputs[0].as_numpy()
    monkeypatch.setitem(sys.modules, backend.__name__, backend)
    path = template() / "minilm_encoder" / "1" / "model.py"
    spec = importlib.util.spec_from_file_location("minilm_encoder_model", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = module.TritonPythonModel()
    made.initialize(arguments(repository))
    yield made
    made.finalize()


LOADED = """
import json, runpy, sys, types
backend = sys.modules["triton_python_backend_utils"] = types.ModuleType("backend")
backend.MetricFamily = type("MetricFamily", (), {"COUNTER": 0})
model = runpy.run_path(sys.argv[1])["TritonPythonModel"]()
model.initialize(json.loads(sys.argv[2]))
print([name for name in sys.modules if name.split(".")[0] == "pyarrow"])
"""


def test_loading_the_encoder_imports_no_parquet_library(repository: Path) -> None:
    script = template() / "minilm_encoder" / "1" / "model.py"
    command = [sys.executable, "-c", LOADED, str(script), json.dumps(arguments(repository))]
    assert subprocess.check_output(command, text=True) == "[]\n"


def request(**inputs: Any) -> Any:
    tensors = [Tensor(name, values) for name, values in inputs.items()]
    return SimpleNamespace(inputs=lambda: tensors, request_id=lambda: "")


def texts(*values: bytes) -> Any:
    return request(text=np.array([[value] for value in values], object))


def test_text_comes_out_as_its_ids_do(model: Any) -> None:
    tokens = model.tokenizer(["a b c", "d"])
    ids = request(input_ids=tokens.input_ids, length=tokens.length)
    both = request(length=tokens.length)
    one, other, wrong, neither = model.execute([texts(b"a b c", b"d"), ids, texts(b"\xff"), both])
    np.testing.assert_array_equal(one, other)
    assert one.shape == (2, 384)
    assert "not UTF-8" in wrong
    assert "inputs length; wanted text, or input_ids and length" in neither


def test_what_another_models_tokenizer_gives_is_refused(model: Any, repository: Path) -> None:
    folder = repository / "minilm_tokenizer" / "1"
    raw = json.dumps(FOREIGN).encode()
    (folder / "tokenizer.json").write_bytes(raw)
    metadata = json.loads((folder / "metadata.json").read_text())
    metadata["arrowhead.certificate"]["tokenizer_sha256"] = hashlib.sha256(raw).hexdigest()
    (folder / "metadata.json").write_text(json.dumps(metadata))
    good, far, empty = model.execute([texts(b"near near"), texts(b"near", b"far"), texts(b"")])
    assert good.shape == (1, 384)
    assert "row 1: ids from 1000000000 to 1000000000; wanted 0 to 30521" in far
    assert "row 0: length 0" in empty
