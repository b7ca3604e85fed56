# SPDX-License-Identifier: Apache-2.0
"""MPNet (Song et al. 2020, arXiv:2004.09297): BERT's layer with a bias by distance.

Same computation as HuggingFace's `transformers/models/mpnet/modeling_mpnet.py`. The bias on the
attention scores depends on the distance of two tokens, in T5's buckets, and is the same in every
layer.
"""

from __future__ import annotations

import math
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
    post_norm_layers,
    post_norm_shapes,
)
from arrowhead_engine.packing import Group, Step
from arrowhead_engine.tensors import Tensors

FIRST_POSITION = 2  # after the pad id, which is 1 in every MPNet
MAX_DISTANCE = 128  # tokens; beyond it all distances share the last bucket


LAYER = "encoder.layer.{}."
NAMES = {
    "query": "attention.attn.q",
    "key": "attention.attn.k",
    "value": "attention.attn.v",
    "attention_out": "attention.attn.o",
    "attention_norm": "attention.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "norm": "output.LayerNorm",
}


@dataclass(frozen=True)
class MPNetConfig(EncoderSizes):
    """MPNet's sizes."""

    layer_norm_eps: float = 1e-12
    hidden_act: str = "gelu"
    relative_attention_num_buckets: int = 32

    def __post_init__(self) -> None:
        """Refuses what would come out wrong."""
        super().__post_init__()
        # The original computes its buckets for 32, whatever the configuration says.
        self.only(hidden_act="gelu", relative_attention_num_buckets=32)

    @property
    def most_tokens(self) -> int:
        """The longest text the position table has rows for."""
        return self.max_position_embeddings - FIRST_POSITION


@merged
def shapes(config: MPNetConfig) -> Iterator[Shapes]:
    """Every tensor the network reads, by name, and its shape."""
    d, wide = config.hidden_size, config.intermediate_size
    yield {
        "embeddings.word_embeddings.weight": (config.vocab_size, d),
        "embeddings.position_embeddings.weight": (config.max_position_embeddings, d),
        "encoder.relative_attention_bias.weight": (
            config.relative_attention_num_buckets,
            config.num_attention_heads,
        ),
    }
    yield norm_shapes("embeddings.LayerNorm", d)
    for i in range(config.num_hidden_layers):
        yield post_norm_shapes(LAYER.format(i), NAMES, d, wide)


def buckets(length: int, count: int = 32) -> Tensor:
    """T5's bucket of each pair of places: int64 [S, S], rows look at columns.

    Half of the buckets are for what comes before, half for what comes after; in each half the near
    distances have a bucket of their own and the far ones share in steps that grow.
    """
    places = torch.arange(length)
    distance = places[:, None] - places[None, :]
    half = count // 2
    after = (distance < 0).long() * half
    distance = distance.abs()
    exact = half // 2
    growing = torch.log(distance.float() / exact) / math.log(MAX_DISTANCE / exact)
    far = (exact + (growing * (half - exact)).long()).clamp(max=half - 1)
    return after + torch.where(distance < exact, distance, far)


class MPNet:
    """The network: `Step` -> token vectors float32 [T, D]."""

    def __init__(self, config: MPNetConfig, weight: Tensors, dtype: torch.dtype) -> None:
        """Takes its tensors from `weight(name)`, converting once what the dtype asks for."""
        self.words = weight.rows("embeddings.word_embeddings.weight")
        positions = weight("embeddings.position_embeddings.weight")
        self.position_embeddings = positions[FIRST_POSITION:].float()
        # [H, S, S] for the longest text; shorter ones use its corner.
        bias = weight("encoder.relative_attention_bias.weight")
        self.bias = bias[buckets(config.most_tokens).to(bias.device)].permute(2, 0, 1).to(dtype)
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
        masks = [self._mask(group) for group in step.groups]
        for layer in self.layers:
            x = layer(x, step.groups, masks)
        return x[: step.real]

    def _mask(self, group: Group) -> Tensor:
        bias = self.bias[:, : group.length, : group.length]  # [H, S, S]
        if group.mask is None:
            return bias[None]
        return torch.where(group.mask, bias[None], float("-inf"))  # [B, H, S, S]
