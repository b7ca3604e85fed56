# SPDX-License-Identifier: Apache-2.0
"""DistilBERT (Sanh et al. 2019, arXiv:1910.01108): BERT's layer, its own names, no token types.

Same computation as HuggingFace's `transformers/models/distilbert/modeling_distilbert.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from arrowhead_engine.layers import (
    PostNormLayer,
    Shapes,
    Sizes,
    Weights,
    linear,
    linear_shapes,
    merged,
    norm,
    norm_shapes,
    padding_masks,
)
from arrowhead_engine.packing import Step

EPS = 1e-12  # fixed in the original


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


def shapes(config: DistilBertConfig) -> Shapes:
    """Every tensor the network reads, by name, and its shape."""
    return merged(_shapes(config))


def _shapes(config: DistilBertConfig) -> Iterator[Shapes]:
    d, wide = config.dim, config.hidden_dim
    yield {
        "embeddings.word_embeddings.weight": (config.vocab_size, d),
        "embeddings.position_embeddings.weight": (config.max_position_embeddings, d),
    }
    yield norm_shapes("embeddings.LayerNorm", d)
    for i in range(config.n_layers):
        at = f"transformer.layer.{i}."
        for part in ("q_lin", "k_lin", "v_lin", "out_lin"):
            yield linear_shapes(f"{at}attention.{part}", d, d)
        yield norm_shapes(f"{at}sa_layer_norm", d)
        yield linear_shapes(f"{at}ffn.lin1", wide, d)
        yield linear_shapes(f"{at}ffn.lin2", d, wide)
        yield norm_shapes(f"{at}output_layer_norm", d)


class DistilBert:
    """The network: `Step` -> token vectors float32 [T, D]."""

    def __init__(self, config: DistilBertConfig, weight: Weights, dtype: torch.dtype) -> None:
        """Takes its tensors from `weight(name)`, converting once what the dtype asks for."""
        self.word_embeddings = weight("embeddings.word_embeddings.weight")  # stays in the map
        self.position_embeddings = weight("embeddings.position_embeddings.weight").float()
        self.norm = norm(weight, "embeddings.LayerNorm", EPS)
        self.layers = []
        for i in range(config.n_layers):
            at = f"transformer.layer.{i}."
            qkv = [f"{at}attention.{part}_lin" for part in "qkv"]
            self.layers.append(
                PostNormLayer(
                    qkv=linear(weight, *qkv, dtype=dtype),
                    attention_out=linear(weight, f"{at}attention.out_lin", dtype=dtype),
                    attention_norm=norm(weight, f"{at}sa_layer_norm", EPS),
                    up=linear(weight, f"{at}ffn.lin1", dtype=dtype),
                    down=linear(weight, f"{at}ffn.lin2", dtype=dtype),
                    norm=norm(weight, f"{at}output_layer_norm", EPS),
                    heads=config.n_heads,
                    dtype=dtype,
                )
            )

    def __call__(self, step: Step) -> Tensor:
        """The vector of every real token in the step."""
        words = F.embedding(step.input_ids, self.word_embeddings)
        x = self.norm(self.position_embeddings[step.positions] + words)
        masks = padding_masks(step)
        for layer in self.layers:
            x = layer(x, step.groups, masks)
        return x[: step.real]
