# SPDX-License-Identifier: Apache-2.0
"""DistilBERT (Sanh et al. 2019, arXiv:1910.01108): BERT's layer, its own names, no token types.

Same computation as HuggingFace's `transformers/models/distilbert/modeling_distilbert.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from arrowhead_engine.sizes import PostNorm, Shapes, Sizes, merged

NAMES = {
    "query": "attention.q_lin",
    "key": "attention.k_lin",
    "value": "attention.v_lin",
    "attention_out": "attention.out_lin",
    "attention_norm": "sa_layer_norm",
    "up": "ffn.lin1",
    "down": "ffn.lin2",
    "norm": "output_layer_norm",
}


@dataclass(frozen=True)
class DistilBertConfig(Sizes):
    """DistilBERT's sizes."""

    dim: int
    n_layers: int
    n_heads: int
    hidden_dim: int
    vocab_size: int
    max_position_embeddings: int
    activation: str = "gelu"

    def __post_init__(self) -> None:
        """Refuses what would come out wrong."""
        super().__post_init__()
        self.only(activation="gelu")
        self.divisible(self.dim, self.n_heads)

    @property
    def width(self) -> int:
        """D."""
        return self.dim

    @property
    def most_tokens(self) -> int:
        """The longest text the position table has rows for."""
        return self.max_position_embeddings


def plan(config: DistilBertConfig) -> PostNorm:
    """The network."""
    return PostNorm(
        words="embeddings.word_embeddings.weight",
        positions="embeddings.position_embeddings.weight",
        first_position=0,
        types=None,
        norm="embeddings.LayerNorm",
        layer="transformer.layer.{}.",
        names=NAMES,
        layers=config.n_layers,
        width=config.dim,
        heads=config.n_heads,
        wide=config.hidden_dim,
        eps=1e-12,  # fixed in the original
    )


@merged
def shapes(config: DistilBertConfig) -> Iterator[Shapes]:
    """Every tensor the network reads, by name, and its shape."""
    yield {
        "embeddings.word_embeddings.weight": (config.vocab_size, config.dim),
        "embeddings.position_embeddings.weight": (config.max_position_embeddings, config.dim),
    }
    yield from plan(config).layer_shapes()
