# SPDX-License-Identifier: Apache-2.0
"""A small random BERT with MiniLM's tokenizer, and what its entry and its source make of texts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from arrowhead_conversion.convert import Converted
from arrowhead_engine.encoder import Encoder, cosine
from arrowhead_engine.tokenizer import Tokenizer

Vectors = npt.NDArray[np.float32]
TEXTS = ["one", "two words", "", "and a longer third text, which is cut off " * 20]

TINY = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
}


@pytest.fixture(scope="session")
def tiny_model(minilm_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MiniLM's pipeline around a random network. Tests must not change it."""
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("models") / "tiny"
    shutil.copytree(minilm_source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.manual_seed(0)
    config = BertConfig(**{**json.loads((minilm_source / "config.json").read_text()), **TINY})
    BertModel(config).save_pretrained(folder)
    pooling = folder / "1_Pooling" / "config.json"
    edit(pooling, word_embedding_dimension=TINY["hidden_size"])
    edit(folder / "sentence_bert_config.json", max_seq_length=48)
    return folder


@pytest.fixture
def tiny(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, to be changed."""
    return shutil.copytree(tiny_model, tmp_path / "tiny")


def edit(path: Path, **changes: object) -> None:
    """Sets (or, with ..., removes) values of a JSON object in a file."""
    value = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in value.items() if v is not ...}))


def served(made: Converted, texts: Sequence[str]) -> Vectors:
    """The vectors of the entry's tokenizer and encoder, float32 compute, all texts together."""
    folder = made.weights.parents[2] / f"{made.name}_tokenizer" / str(made.version)
    encoder = Encoder.open(made.weights, device="cpu", dtype="float32")
    encoder.verify()
    tokens = Tokenizer.open(folder)(texts)
    return encoder.embed(encoder.check(tokens.input_ids, tokens.length))


def source(folder: Path, texts: Sequence[str], **options: Any) -> Vectors:
    """The source library's vectors, each text alone."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(
        str(folder), device="cpu", model_kwargs={"dtype": torch.float32}, local_files_only=True
    )
    vectors: Vectors = model.encode(list(texts), batch_size=1, **options)
    return vectors


def assert_close(met: Vectors, wanted: Vectors, least: float = 0.99999) -> None:
    assert met.shape == wanted.shape
    cosines = [cosine(a, b) for a, b in zip(met, wanted, strict=True)]
    assert min(cosines) >= least
    np.testing.assert_allclose(
        np.linalg.norm(met, axis=1), np.linalg.norm(wanted, axis=1), rtol=5e-3
    )


def modules(folder: Path, *kinds: str) -> None:
    """Gives the model this pipeline, in the newer spelling of the modules' classes."""
    home = {
        "Transformer": "sentence_transformers.base.modules.transformer",
        "Pooling": "sentence_transformers.sentence_transformer.modules.pooling",
        "Dense": "sentence_transformers.base.modules.dense",
        "Normalize": "sentence_transformers.base.modules.normalize",
    }
    rows = [
        {
            "idx": i,
            "name": str(i),
            "path": "" if i == 0 else f"{i}_{kind}",
            "type": f"{home[kind]}.{kind}",
        }
        for i, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(rows))
