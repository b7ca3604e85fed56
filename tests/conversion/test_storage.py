# SPDX-License-Identifier: Apache-2.0
"""How weights are stored and where they come from changes the file, and the vectors as promised."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from arrowhead_conversion.certificate import LEAST_COSINE
from arrowhead_conversion.convert import convert
from arrowhead_conversion.errors import BadWeights, SourceNotFound
from arrowhead_conversion.weights import Storage
from arrowhead_engine.encoder import Encoder
from arrowhead_engine.weightfile import WeightFile
from arrowhead_engine.weightwriter import Compression

from .conftest import TEXTS, TINY, assert_close, edit, modules, served, source

WORDS = "embeddings.word_embeddings.weight"


@pytest.mark.parametrize(
    ("storage", "compression"),
    [*itertools.product(("float16", "bfloat16", "float32", "int8"), ("none", "lz4", "zstd"))],
)
def test_each_way_to_store(
    minilm_source: Path, tmp_path: Path, storage: Storage, compression: Compression
) -> None:
    made = convert(
        str(minilm_source),
        "minilm",
        tmp_path / "repository",
        storage=storage,
        compression=compression,
        progress=False,
    )
    assert made.certificate.worst_cosine >= LEAST_COSINE[storage]
    assert_close(served(made, TEXTS), source(minilm_source, TEXTS), LEAST_COSINE[storage])
    weights = WeightFile.open(made.weights)
    assert weights.mapped is (compression == "none")
    assert weights.tensors[WORDS].dtype == storage
    bias = weights.tensors["embeddings.LayerNorm.bias"]
    assert bias.dtype == ("float32" if storage == "int8" else storage)
    million = {"float16": 45.1, "bfloat16": 45.1, "float32": 90.3, "int8": 22.7}[storage]
    size = made.weights.stat().st_size / (million * 1e6)
    assert size <= {"none": 1.02, "lz4": 1.02, "zstd": 0.93}[compression]


def test_int8_rows_are_within_half_a_step(tiny: Path, tmp_path: Path) -> None:
    made = convert(str(tiny), "tiny", tmp_path / "repository", storage="int8", progress=False)
    weights = WeightFile.open(made.weights)
    theirs = load_file(tiny / "model.safetensors")[WORDS].numpy()
    scales = weights.scales(WORDS)[:, None]
    ours = np.frombuffer(weights.buffer(WORDS), np.int8).reshape(theirs.shape) * scales
    assert (np.abs(ours - theirs) <= scales / 2 * 1.001).all()
    np.testing.assert_allclose(scales[:, 0], np.abs(theirs).max(1) / 127, rtol=1e-6)


def test_int8_words_stay_in_the_map(tiny: Path, tmp_path: Path) -> None:
    made = convert(str(tiny), "tiny", tmp_path / "repository", storage="int8", progress=False)
    encoder = Encoder.open(made.weights, device="cpu", dtype="float32")
    base = np.frombuffer(encoder._weights.map(), np.uint8)
    table = encoder._engine.network.words.table  # type: ignore[attr-defined]
    assert table.dtype == torch.int8
    assert 0 < table.data_ptr() - base.ctypes.data < base.nbytes


def test_a_row_of_zeros_is_one_in_int8(tiny: Path, tmp_path: Path) -> None:
    path = tiny / "model.safetensors"
    tensors = load_file(path)
    tensors[WORDS][7] = 0
    save_file(tensors, path, metadata={"format": "pt"})
    made = convert(str(tiny), "tiny", tmp_path / "repository", storage="int8", progress=False)
    weights = WeightFile.open(made.weights)
    assert weights.scales(WORDS)[7] == 0
    assert not np.frombuffer(weights.buffer(WORDS), np.int8)[7 * 24 : 8 * 24].any()


def test_what_float16_cannot_hold_bfloat16_can(tiny: Path, tmp_path: Path) -> None:
    path = tiny / "model.safetensors"
    tensors = load_file(path)
    tensors["encoder.layer.0.output.dense.bias"][3] = 1e5
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(BadWeights, match=r"reaches 100000, beyond float16's 65504; .*--dtype"):
        convert(str(tiny), "tiny", tmp_path / "repository", progress=False)
    convert(str(tiny), "tiny", tmp_path / "repository", storage="bfloat16", progress=False)


def pickled(folder: Path, *, shards: int = 1, old: bool = False) -> None:
    """The checkpoint as `.bin` files, of today's PyTorch or of one before 1.6."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    path.unlink()
    index = {}
    for i in range(shards):
        file = f"pytorch_model-{i:05}.bin" if shards > 1 else "pytorch_model.bin"
        part = {name: tensors[name] for name in sorted(tensors)[i::shards]}
        torch.save(part, folder / file, _use_new_zipfile_serialization=not old)
        index |= dict.fromkeys(part, file)
    if shards > 1:
        (folder / "pytorch_model.bin.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": index})
        )


@pytest.mark.parametrize(("shards", "old"), [(1, False), (1, True), (2, False)])
def test_bin_files_hold_the_same_weights(
    tiny: Path, tmp_path: Path, shards: int, old: bool
) -> None:
    out = tmp_path / "repository"
    whole = convert(str(tiny), "whole", out, progress=False)
    pickled(tiny, shards=shards, old=old)
    made = convert(str(tiny), "pickled", out, progress=False)
    assert made.certificate.weights_sha256 == whole.certificate.weights_sha256


def test_safetensors_come_before_bin_files(tiny: Path, tmp_path: Path) -> None:
    (tiny / "pytorch_model.bin").write_bytes(b"never opened")
    convert(str(tiny), "tiny", tmp_path / "repository", progress=False)


def test_no_checkpoint_at_all(tiny: Path, tmp_path: Path) -> None:
    (tiny / "model.safetensors").unlink()
    with pytest.raises(SourceNotFound, match=r"neither model\.safetensors nor pytorch_model\.bin"):
        convert(str(tiny), "tiny", tmp_path / "repository", progress=False)


def last_token(folder: Path, **config: object) -> None:
    modules(folder, "Transformer", "Pooling", "Normalize")
    pooling = {"word_embedding_dimension": TINY["hidden_size"], "pooling_mode_lasttoken": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))


GENERAL = {
    "qwen3": {"num_key_value_heads": 1, "head_dim": 8},
    "gemma3_text": {
        "num_key_value_heads": 1,
        "head_dim": 8,
        "use_bidirectional_attention": True,
        "hidden_activation": "gelu_pytorch_tanh",
    },
    "gte": {},
}


@pytest.mark.parametrize("model_type", GENERAL)
@pytest.mark.parametrize("head", [False, True], ids=["bare", "in a language model"])
def test_a_network_without_a_file_here(
    tiny: Path, tmp_path: Path, model_type: str, head: bool
) -> None:
    """Through transformers' own module; its checkpoint in bfloat16, as such models come."""
    torch.manual_seed(2)
    sizes = {**TINY, **GENERAL[model_type], "vocab_size": 30522, "pad_token_id": 0}
    config = transformers.AutoConfig.for_model(model_type, **sizes)
    make = transformers.AutoModel
    if head and model_type != "gte":
        make = transformers.AutoModelForCausalLM
    model = make.from_config(config).bfloat16()
    (tiny / "model.safetensors").unlink()
    model.save_pretrained(tiny)
    last_token(tiny)
    edit(tiny / "tokenizer_config.json", padding_side="left")
    made = convert(str(tiny), "tiny", tmp_path / "repository", progress=False)
    assert made.spec.architecture == model_type
    assert_close(served(made, TEXTS), source(tiny, TEXTS))


def test_a_mapped_tensor_is_not_copied_into_transformers_module(tiny: Path, tmp_path: Path) -> None:
    sizes = {**TINY, **GENERAL["qwen3"], "vocab_size": 30522, "pad_token_id": 0}
    torch.manual_seed(2)
    config = transformers.AutoConfig.for_model("qwen3", **sizes)
    (tiny / "model.safetensors").unlink()
    transformers.AutoModel.from_config(config).save_pretrained(tiny)
    made = convert(str(tiny), "tiny", tmp_path / "repository", storage="float32", progress=False)
    encoder = Encoder.open(made.weights, device="cpu", dtype="float32")
    base = np.frombuffer(encoder._weights.map(), np.uint8)
    places = range(base.ctypes.data, base.ctypes.data + base.nbytes)
    module = encoder._engine.network._module  # type: ignore[attr-defined]
    assert all(parameter.data_ptr() in places for parameter in module.parameters())


def test_a_killed_conversion_leaves_nothing_visible_and_starts_over(
    tiny: Path, tmp_path: Path
) -> None:
    """Killed at its slowest step, the comparison; only hidden staging is left."""
    out = tmp_path / "repository"
    code = (
        "import os, signal; from arrowhead_conversion import certificate;"
        "certificate.certify = lambda *_: os.kill(os.getpid(), signal.SIGKILL);"
        "from pathlib import Path; from arrowhead_conversion.convert import convert;"
        f"convert({str(tiny)!r}, 'tiny', Path({str(out)!r}), progress=False)"
    )
    killed = subprocess.run([sys.executable, "-c", code], check=False)
    assert killed.returncode == -9
    left = {path.relative_to(out).parts[1] for path in out.rglob("*") if path.is_file()}
    assert left == {".staging"}
    assert convert(str(tiny), "tiny", out, progress=False).version == 1
    assert not list(out.rglob(".staging"))
