# SPDX-License-Identifier: Apache-2.0
"""DistilBERT (Sanh et al. 2019, arXiv:1910.01108): BERT's layer, its own names, no token types.

Same computation as HuggingFace's `transformers/models/distilbert/modeling_distilbert.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from arrowhead_engine.layers import (
    Shapes,
    Sizes,
    merged,
    norm,
    norm_shapes,
    padding_masks,
    post_norm_layers,
    post_norm_shapes,
)
from arrowhead_engine.packing import Step
from arrowhead_engine.tensors import Tensors

EPS = 1e-12  # fixed in the original


LAYER = "transformer.layer.{}."
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


@merged
def shapes(config: DistilBertConfig) -> Iterator[Shapes]:
    """Every tensor the network reads, by name, and its shape."""
    d, wide = config.dim, config.hidden_dim
    yield {
        "embeddings.word_embeddings.weight": (config.vocab_size, d),
        "embeddings.position_embeddings.weight": (config.max_position_embeddings, d),
    }
    yield norm_shapes("embeddings.LayerNorm", d)
    for i in range(config.n_layers):
        yield post_norm_shapes(LAYER.format(i), NAMES, d, wide)


class DistilBert:
    """The network: `Step` -> token vectors float32 [T, D]."""

    def __init__(self, config: DistilBertConfig, weight: Tensors, dtype: torch.dtype) -> None:
        """Takes its tensors from `weight(name)`, converting once what the dtype asks for."""
        self.words = weight.rows("embeddings.word_embeddings.weight")
        self.position_embeddings = weight("embeddings.position_embeddings.weight").float()
        self.norm = norm(weight, "embeddings.LayerNorm", EPS)
        self.layers = post_norm_layers(
            weight,
            LAYER,
            NAMES,
            count=config.n_layers,
            heads=config.n_heads,
            eps=EPS,
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
