# SPDX-License-Identifier: Apache-2.0
"""Small random networks of transformers, and weight files made from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file

from arrowhead_engine.architectures import WITH_A_FILE, architecture
from arrowhead_engine.spec import MODEL_KEY, ModelSpec
from arrowhead_engine.weightfile import Tensor
from arrowhead_engine.weightwriter import write

VOCAB = 500
COMMON = {"vocab_size": VOCAB, "hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
BERT = {**COMMON, "intermediate_size": 80, "max_position_embeddings": 160}


def post_norm_configs(sizes: dict[str, Any]) -> dict[str, Any]:
    """Of BERT and its kin, in sizes by BERT's names."""
    return {
        "bert": transformers.BertConfig(**sizes),
        "roberta": transformers.RobertaConfig(**sizes, type_vocab_size=1),
        "xlm-roberta": transformers.XLMRobertaConfig(**sizes, type_vocab_size=1),
        "camembert": transformers.CamembertConfig(**sizes, type_vocab_size=1),
        "distilbert": transformers.DistilBertConfig(
            vocab_size=sizes["vocab_size"],
            dim=sizes["hidden_size"],
            n_layers=sizes["num_hidden_layers"],
            n_heads=sizes["num_attention_heads"],
            hidden_dim=sizes["intermediate_size"],
            max_position_embeddings=sizes["max_position_embeddings"],
        ),
        "mpnet": transformers.MPNetConfig(**sizes),
    }


def configs() -> dict[str, Any]:
    """Of the networks that have a file here."""
    return {
        **post_norm_configs(BERT),
        "modernbert": transformers.ModernBertConfig(
            **BERT,
            local_attention=32,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            cls_token_id=1,
            sep_token_id=2,
        ),
        "nomic_bert": transformers.NomicBertConfig(**BERT),
    }


def model_file(
    name: str, config: Any, folder: Path, dtype: str = "float32", seed: int = 1
) -> tuple[Any, Path]:
    """A random network of transformers, and its weight file, matrices stored in `dtype`."""
    torch.manual_seed(seed)
    make = (
        transformers.T5EncoderModel._from_config
        if name == "t5"
        else transformers.AutoModel.from_config
    )
    model = make(config, attn_implementation="eager").eval()
    with torch.no_grad():  # as drawn, every bias and norm would be that of no layer at all
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    kind = architecture(name)
    sizes = kind.config(json.loads(config.to_json_string()))
    if name in WITH_A_FILE:  # the names are those of checkpoints
        model.save_pretrained(folder)
        state = load_file(folder / "model.safetensors")
    else:
        state = model.state_dict()
    state = {key.removeprefix(kind.prefix): value for key, value in state.items()}
    tensors = [
        stored(key, state[key], dtype if len(shape) == 2 else "float32")
        for key, shape in kind.shapes(sizes).items()
    ]
    left = set(state) - {tensor.name for tensor in tensors}
    tied = {"encoder.embed_tokens.weight"} if name == "t5" else set()
    assert {key for key in left - tied if not key.startswith(kind.dropped)} == set()
    path = folder / "weights.parquet"
    spec = ModelSpec(name, sizes.to_dict(), "mean", True, 150, sizes.width)
    write(path, tensors, {MODEL_KEY: spec.to_json()})
    return model, path


def stored(name: str, values: torch.Tensor, dtype: str) -> Tensor:
    """A tensor as a file holds it in `dtype`; for int8 it has two dimensions."""
    shape = tuple(values.shape)
    if dtype == "int8":
        scales = values.abs().amax(1) / 127
        data = (values / scales[:, None]).round().to(torch.int8)
        return Tensor(name, dtype, shape, data.numpy().tobytes(), scales.numpy())
    cast = values.to(getattr(torch, dtype)).contiguous()
    return Tensor(name, dtype, shape, cast.view(-1).view(torch.uint8).numpy().tobytes())
