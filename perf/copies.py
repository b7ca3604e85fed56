# SPDX-License-Identifier: Apache-2.0
"""Copies of a model repository with one thing changed. Weights are linked, not copied."""

from __future__ import annotations

import shutil
from pathlib import Path

from arrowhead_conversion import pins, settings
from perf.server import MODEL

_NO_OP = '''\
"""An encoder that computes nothing: ones."""

import json

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        outputs = json.loads(args["model_config"])["output"]
        self.width = int(outputs[0]["dims"][0])

    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        length = pb_utils.get_input_tensor_by_name(request, "length").as_numpy()
        vectors = np.ones((len(length), self.width), np.float32)
        return pb_utils.InferenceResponse([pb_utils.Tensor("embeddings", vectors)])
'''


def with_no_op(repository: Path, folder: Path) -> Path:
    """A copy in `folder`, to be made, whose encoder answers ones without computing anything."""
    _copy(repository, folder)
    for version in _versions(folder / f"{MODEL}_encoder"):
        (version / "model.py").write_text(_NO_OP, encoding="utf-8")
    return folder


def with_instances(repository: Path, folder: Path, count: int) -> Path:
    """A copy in `folder`, to be made, that asks for so many processes of the encoder."""
    _copy(repository, folder)
    settings.set_instances(folder, MODEL, count)
    return folder


def with_dtype(repository: Path, folder: Path, dtype: str, *, fused: bool) -> Path:
    """A copy in `folder`, to be made, that computes in `dtype`, in one step or two."""
    _copy(repository, folder)
    settings.set_compute_dtype(folder, MODEL, dtype)
    settings.set_steps(folder, MODEL, "fused" if fused else "two-step")
    return folder


def with_twin(repository: Path, folder: Path) -> tuple[int, int]:
    """A copy in `folder`, to be made, with the live version and its twin; their numbers.

    The twin is the same weights under the next number, as a second conversion makes it.
    """
    _copy(repository, folder)
    live = pins.live(folder, MODEL)
    if live is None:
        raise FileNotFoundError(f"{repository}: no model `{MODEL}` in it: `make convert` makes it")
    twin = pins.highest(folder, MODEL) + 1
    for part in (MODEL, f"{MODEL}_tokenizer", f"{MODEL}_encoder"):
        shutil.copytree(folder / part / str(live), folder / part / str(twin), symlinks=True)
    return live, twin


def tuned(source: Path, folder: Path) -> Path:
    """MiniLM, changed a little, as by further training; `folder` itself."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, folder)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    torch.manual_seed(0)
    weight = tensors["encoder.layer.3.output.dense.weight"]
    weight += torch.randn_like(weight) * 0.05
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def _copy(repository: Path, folder: Path) -> None:
    for part in (MODEL, f"{MODEL}_tokenizer", f"{MODEL}_encoder"):
        for source in (repository / part).rglob("*"):
            target = folder / part / source.relative_to(repository / part)
            if source.is_dir():
                target.mkdir(parents=True, exist_ok=True)
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.suffix == ".parquet":
                target.symlink_to(source.resolve())
            else:
                shutil.copyfile(source, target)


def _versions(model: Path) -> list[Path]:
    return [folder for folder in model.iterdir() if folder.name.isdecimal()]
