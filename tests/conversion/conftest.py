# SPDX-License-Identifier: Apache-2.0
"""A small random BERT with MiniLM's tokenizer: a whole model that converts in a moment."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

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
