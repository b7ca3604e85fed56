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
from typing import Any

import numpy as np
import numpy.typing as npt

from arrowhead_engine.sizes import EncoderSizes, PostNorm, Shapes, merged

FIRST_POSITION = 2  # after the pad id, which is 1 in every MPNet
MAX_DISTANCE = 128  # tokens; beyond it all distances share the last bucket
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


def plan(config: MPNetConfig) -> PostNorm:
    """The network."""
    return PostNorm(
        words="embeddings.word_embeddings.weight",
        positions="embeddings.position_embeddings.weight",
        first_position=FIRST_POSITION,
        types=None,
        norm="embeddings.LayerNorm",
        layer="encoder.layer.{}.",
        names=NAMES,
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        heads=config.num_attention_heads,
        wide=config.intermediate_size,
        eps=config.layer_norm_eps,
        distances=("encoder.relative_attention_bias.weight", distances),
    )


@merged
def shapes(config: MPNetConfig) -> Iterator[Shapes]:
    """Every tensor the network reads, by name, and its shape."""
    d = config.hidden_size
    yield {
        "embeddings.word_embeddings.weight": (config.vocab_size, d),
        "embeddings.position_embeddings.weight": (config.max_position_embeddings, d),
        "encoder.relative_attention_bias.weight": (
            config.relative_attention_num_buckets,
            config.num_attention_heads,
        ),
    }
    yield from plan(config).layer_shapes()


def distances(table: npt.NDArray[Any], length: int) -> npt.NDArray[np.float32]:
    """A table [buckets, H] -> float32 [H, 2 S - 1], by key's minus query's place plus S - 1.

    T5's buckets: half of them are for what comes before, half for what comes after; in each half
    the near distances have a bucket of their own and the far ones share in steps that grow.
    """
    ahead = np.arange(1 - length, length)
    half = len(table) // 2
    exact = half // 2
    distance = np.abs(ahead)
    # In float32, as the original: a distance on the edge between two buckets must fall as there.
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    growing = ratio / np.float32(math.log(MAX_DISTANCE / exact)) * np.float32(half - exact)
    far = np.minimum(exact + growing.astype(np.int64), half - 1)
    buckets = (ahead > 0) * half + np.where(distance < exact, distance, far)
    return np.ascontiguousarray(table[buckets].T, np.float32)
