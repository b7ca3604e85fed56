# SPDX-License-Identifier: Apache-2.0
"""BERT (Devlin et al. 2018, arXiv:1810.04805): sizes, tensors and plan.

Same computation as HuggingFace's `transformers/models/bert/modeling_bert.py`, without the pooler,
in inference only. Weight names are the checkpoint's own. RoBERTa (Liu et al. 2019,
arXiv:1907.11692) and XLM-RoBERTa are the same network whose positions begin after the pad id.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from arrowhead_engine.sizes import EncoderSizes, PostNorm, Shapes, merged

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


def plan(config: BertConfig) -> PostNorm:
    """The network."""
    return PostNorm(
        words="embeddings.word_embeddings.weight",
        positions="embeddings.position_embeddings.weight",
        first_position=config.first_position,
        types="embeddings.token_type_embeddings.weight",
        norm="embeddings.LayerNorm",
        layer="encoder.layer.{}.",
        names=NAMES,
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        heads=config.num_attention_heads,
        wide=config.intermediate_size,
        eps=config.layer_norm_eps,
    )


@merged
def shapes(config: BertConfig) -> Iterator[Shapes]:
    """Every tensor the network reads, by name, and its shape."""
    d = config.hidden_size
    yield {
        "embeddings.word_embeddings.weight": (config.vocab_size, d),
        "embeddings.position_embeddings.weight": (config.max_position_embeddings, d),
        "embeddings.token_type_embeddings.weight": (config.type_vocab_size, d),
    }
    yield from plan(config).layer_shapes()
