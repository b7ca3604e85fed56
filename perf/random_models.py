# SPDX-License-Identifier: Apache-2.0
"""Small random models of every architecture around MiniLM's tokenizer, in every kind of folder.

No hub is needed for them, and each converts in about a second. What they embed means nothing; that
the engine's vectors are the source library's shows as well as with a trained model, or better:
nothing about a random network is small enough to be overlooked.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from safetensors.torch import save_file

Source = Literal["safetensors", "safetensors in shards", "bin", "bin in shards"]
SOURCES: tuple[Source, ...] = (
    "safetensors",
    "safetensors in shards",
    "bin",
    "bin in shards",
)

_VOCAB = 30522  # of MiniLM's tokenizer
_COMMON = {
    "vocab_size": _VOCAB,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 80,
    "max_position_embeddings": 160,
    "pad_token_id": 0,
}
_DECODER = {**_COMMON, "num_key_value_heads": 2, "head_dim": 12}
# Sizes by HuggingFace's model_type; the first half has a file in the engine, the rest has not.
ARCHITECTURES: Mapping[str, dict[str, Any]] = MappingProxyType(
    {
        "bert": _COMMON,
        "roberta": {**_COMMON, "type_vocab_size": 1, "pad_token_id": 1},
        "xlm-roberta": {**_COMMON, "type_vocab_size": 1, "pad_token_id": 1},
        "camembert": {**_COMMON, "type_vocab_size": 1, "pad_token_id": 1},
        "distilbert": {
            "vocab_size": _VOCAB,
            "dim": 48,
            "n_layers": 3,
            "n_heads": 4,
            "hidden_dim": 80,
            "max_position_embeddings": 160,
        },
        "mpnet": {**_COMMON, "pad_token_id": 1},
        "modernbert": {
            **_COMMON,
            "local_attention": 32,
            "bos_token_id": 101,
            "eos_token_id": 102,
            "cls_token_id": 101,
            "sep_token_id": 102,
        },
        "nomic_bert": _COMMON,
        "qwen3": _DECODER,
        "gemma3_text": {**_DECODER, "use_bidirectional_attention": True, "sliding_window": 32},
        "mistral": {**_DECODER, "sliding_window": None},
        "gte": _COMMON,
        "eurobert": {**_DECODER, "bos_token_id": 101, "eos_token_id": 102, "mask_token_id": 103},
        "electra": {**_COMMON, "embedding_size": 24},
        "albert": {**_COMMON, "embedding_size": 24},
        "deberta-v2": _COMMON,
        "t5": {
            "vocab_size": _VOCAB,
            "d_model": 48,
            "d_kv": 12,
            "d_ff": 80,
            "num_layers": 3,
            "num_heads": 4,
        },
    }
)


def make(
    folder: Path,
    minilm: Path,
    architecture: str,
    *,
    pooling: str = "mean",
    source: Source = "safetensors",
    seed: int = 0,
    **sizes: Any,
) -> Path:
    """Writes a sentence-transformers model of random weights to `folder`, and gives it back.

    Args:
        folder: to be made.
        minilm: the folder of all-MiniLM-L6-v2, whose tokenizer it gets.
        architecture: a key of `ARCHITECTURES`.
        pooling: a mode of sentence-transformers, or several joined by "+".
        source: how the weights are stored.
        seed: of the weights.
        sizes: in place of those in `ARCHITECTURES`.
    """
    import transformers

    shutil.copytree(minilm, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.bin"))
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(
        architecture, **{**ARCHITECTURES[architecture], **sizes}
    )
    if architecture == "t5":
        model = transformers.T5EncoderModel._from_config(config)
    else:
        model = transformers.AutoModel.from_config(config)
    with torch.no_grad():  # as drawn, every bias and norm would be that of no layer at all
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    width = int(config.hidden_size)
    modes = pooling.split("+")
    _edit(
        folder / "1_Pooling" / "config.json",
        lambda _: {
            "embedding_dimension": width,
            "pooling_mode": modes if len(modes) > 1 else pooling,
        },
    )
    _edit(folder / "sentence_bert_config.json", lambda old: {**old, "max_seq_length": 128})
    _edit(folder / "tokenizer_config.json", lambda old: {**old, "model_max_length": 128})
    _store(folder, source)
    return folder


def _store(folder: Path, source: Source) -> None:
    """The checkpoint that `save_pretrained` wrote, in the form asked for."""
    from safetensors.torch import load_file

    if source == "safetensors":
        return
    whole = folder / "model.safetensors"
    tensors = load_file(whole)
    whole.unlink()
    kind, _, shards = source.partition(" in ")
    stem, suffix = ("model", ".safetensors") if kind == "safetensors" else ("pytorch_model", ".bin")
    parts = 2 if shards else 1
    index: dict[str, str] = {}
    for i in range(parts):
        number = f"-{i + 1:05}-of-{parts:05}" if shards else ""
        file = f"{stem}{number}{suffix}"
        part = {name: tensors[name] for name in sorted(tensors)[i::parts]}
        if kind == "safetensors":
            save_file(part, folder / file, metadata={"format": "pt"})
        else:
            torch.save(part, folder / file)
        index |= dict.fromkeys(part, file)
    if shards:
        content = {"metadata": {}, "weight_map": index}
        (folder / f"{stem}{suffix}.index.json").write_text(json.dumps(content))


def _edit(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
