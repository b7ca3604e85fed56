# SPDX-License-Identifier: Apache-2.0
"""BERT (Devlin et al. 2018, arXiv:1810.04805), on packed tokens. Read downward.

Same computation as HuggingFace's `transformers/models/bert/modeling_bert.py`, without the pooler,
in inference only. Weight names are the checkpoint's own. RoBERTa (Liu et al. 2019,
arXiv:1907.11692) and XLM-RoBERTa are the same network whose positions begin after the pad id.

Letters: T packed tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from arrowhead_engine.layers import (
    EncoderSizes,
    Shapes,
    merged,
    norm,
    norm_shapes,
    padding_masks,
    post_norm_layers,
    post_norm_shapes,
)
from arrowhead_engine.packing import Step
from arrowhead_engine.tensors import Tensors

LAYER = "encoder.layer.{}."
NAMES = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attention_out": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "norm": "output.LayerNorm",
}


@dataclass(frozen=True)
class BertConfig(EncoderSizes):
    """BERT's sizes."""

    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    hidden_act: str = "gelu"
    position_embedding_type: str = "absolute"
    is_decoder: bool = False
    add_cross_attention: bool = False

    def __post_init__(self) -> None:
        """Refuses what would come out wrong."""
        super().__post_init__()
        self.only(
            hidden_act="gelu",
            position_embedding_type="absolute",
            is_decoder=False,
            add_cross_attention=False,
        )

    @property
    def first_position(self) -> int:
        """The row of the position table that belongs to a text's first token."""
        return 0

    @property
    def most_tokens(self) -> int:
        """The longest text the position table has rows for."""
        return self.max_position_embeddings - self.first_position


@dataclass(frozen=True)
class RobertaConfig(BertConfig):
    """RoBERTa's and XLM-RoBERTa's sizes."""

    pad_token_id: int = 1

    @property
    def first_position(self) -> int:
        """Rows up to the pad id are kept for padding, by an accident of the original code."""
        return self.pad_token_id + 1


@merged
def shapes(config: BertConfig) -> Iterator[Shapes]:
    """Every tensor the network reads, by name, and its shape."""
    d, wide = config.hidden_size, config.intermediate_size
    yield {
        "embeddings.word_embeddings.weight": (config.vocab_size, d),
        "embeddings.position_embeddings.weight": (config.max_position_embeddings, d),
        "embeddings.token_type_embeddings.weight": (config.type_vocab_size, d),
    }
    yield norm_shapes("embeddings.LayerNorm", d)
    for i in range(config.num_hidden_layers):
        yield post_norm_shapes(LAYER.format(i), NAMES, d, wide)


class Bert:
    """The network: `Step` -> token vectors float32 [T, D]."""

    def __init__(self, config: BertConfig, weight: Tensors, dtype: torch.dtype) -> None:
        """Takes its tensors from `weight(name)`, converting once what the dtype asks for."""
        self.words = weight.rows("embeddings.word_embeddings.weight")
        # Every text is of token type 0, so that row is added to the positions once and for all.
        self.position_embeddings = (
            weight("embeddings.position_embeddings.weight")[config.first_position :].float()
            + weight("embeddings.token_type_embeddings.weight")[0]
        )
        eps = config.layer_norm_eps
        self.norm = norm(weight, "embeddings.LayerNorm", eps)
        self.layers = post_norm_layers(
            weight,
            LAYER,
            NAMES,
            count=config.num_hidden_layers,
            heads=config.num_attention_heads,
            eps=eps,
            dtype=dtype,
        )

    def __call__(self, step: Step) -> Tensor:
        """The vector of every real token in the step."""
        words = self.words(step.input_ids)
        x = self.norm(self.position_embeddings[step.positions] + words)
        masks = padding_masks(step)
        for layer in self.layers:
            x = layer(x, step.groups, masks)
        return x[: step.real]
