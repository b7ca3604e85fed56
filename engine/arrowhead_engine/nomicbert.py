# SPDX-License-Identifier: Apache-2.0
"""NomicBERT (Nussbaum et al. 2024, arXiv:2402.01613): BERT with rotary positions and SwiGLU.

Same computation as HuggingFace's `transformers/models/nomic_bert/modeling_nomic_bert.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from arrowhead_engine.errors import UnsupportedModel
from arrowhead_engine.layers import (
    Norm,
    Rotary,
    Shapes,
    Sizes,
    attention,
    linear,
    linear_shapes,
    merged,
    norm,
    norm_shapes,
    padding_masks,
)
from arrowhead_engine.linear import Linear
from arrowhead_engine.packing import Group, Step
from arrowhead_engine.tensors import Tensors


@dataclass(frozen=True)
class NomicBertConfig(Sizes):
    """NomicBERT's sizes."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    hidden_act: str = "silu"
    rope_theta: float = 1000.0

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> NomicBertConfig:
        """See `Sizes.from_dict`."""
        rope = raw.get("rope_parameters") or {}
        if rope.get("rope_type", "default") != "default":
            raise UnsupportedModel(f"rope_type is {rope['rope_type']!r}; known is 'default'")
        theta = float(rope.get("rope_theta") or raw.get("rope_theta") or cls.rope_theta)
        return super().from_dict({**raw, "rope_theta": theta})

    def __post_init__(self) -> None:
        """Refuses what would come out wrong."""
        super().__post_init__()
        self.only(hidden_act="silu")
        self.divisible(self.hidden_size, self.num_attention_heads)

    @property
    def width(self) -> int:
        """D."""
        return self.hidden_size

    @property
    def most_tokens(self) -> int:
        """The longest text the network was trained for."""
        return self.max_position_embeddings


@merged
def shapes(config: NomicBertConfig) -> Iterator[Shapes]:
    """Every tensor the network reads, by name, and its shape."""
    d, wide = config.hidden_size, config.intermediate_size
    yield {
        "embeddings.word_embeddings.weight": (config.vocab_size, d),
        "embeddings.token_type_embeddings.weight": (config.type_vocab_size, d),
    }
    yield norm_shapes("embeddings.LayerNorm", d)
    for i in range(config.num_hidden_layers):
        at = f"layers.{i}."
        for part in "qkvo":
            yield linear_shapes(f"{at}self_attn.{part}_proj", d, d, bias=False)
        yield norm_shapes(f"{at}post_attention_layernorm", d)
        yield linear_shapes(f"{at}mlp.gate_proj", wide, d, bias=False)
        yield linear_shapes(f"{at}mlp.up_proj", wide, d, bias=False)
        yield linear_shapes(f"{at}mlp.down_proj", d, wide, bias=False)
        yield norm_shapes(f"{at}post_mlp_layernorm", d)


@dataclass(frozen=True)
class Layer:
    """Attention and gated feed-forward, a norm after each residual. `x` is float32."""

    qkv: Linear
    attention_out: Linear
    attention_norm: Norm
    gate_up: Linear
    down: Linear
    norm: Norm
    heads: int
    dtype: torch.dtype

    def __call__(
        self,
        x: Tensor,
        rotary: Rotary,
        positions: Tensor,
        groups: Sequence[Group],
        masks: Sequence[Tensor | None],
    ) -> Tensor:
        """The next layer's x, [T, D] as this one's."""
        qkv = rotary(self.qkv(x.to(self.dtype)), positions, self.heads)
        mixed = attention(qkv, groups, masks, self.heads)
        x = self.attention_norm(self.attention_out.add(mixed, x))
        gate, up = self.gate_up(x.to(self.dtype)).chunk(2, dim=-1)
        return self.norm(self.down.add(F.silu(gate) * up, x))


class NomicBert:
    """The network: `Step` -> token vectors float32 [T, D]."""

    def __init__(self, config: NomicBertConfig, weight: Tensors, dtype: torch.dtype) -> None:
        """Takes its tensors from `weight(name)`, converting once what the dtype asks for."""
        self.words = weight.rows("embeddings.word_embeddings.weight")
        self.token_type = weight("embeddings.token_type_embeddings.weight")[0].float()
        self.norm = norm(weight, "embeddings.LayerNorm", config.layer_norm_eps)
        head = config.hidden_size // config.num_attention_heads
        device = self.words.table.device
        self.rotary = Rotary(config.rope_theta, head, config.max_position_embeddings, device)
        self.layers = []
        for i in range(config.num_hidden_layers):
            at, eps = f"layers.{i}.", config.layer_norm_eps
            qkv = [f"{at}self_attn.{part}_proj" for part in "qkv"]
            gate_up = [f"{at}mlp.gate_proj", f"{at}mlp.up_proj"]
            self.layers.append(
                Layer(
                    qkv=linear(weight, *qkv, dtype=dtype, bias=False),
                    attention_out=linear(weight, f"{at}self_attn.o_proj", dtype=dtype, bias=False),
                    attention_norm=norm(weight, f"{at}post_attention_layernorm", eps),
                    gate_up=linear(weight, *gate_up, dtype=dtype, bias=False),
                    down=linear(weight, f"{at}mlp.down_proj", dtype=dtype, bias=False),
                    norm=norm(weight, f"{at}post_mlp_layernorm", eps),
                    heads=config.num_attention_heads,
                    dtype=dtype,
                )
            )

    def __call__(self, step: Step) -> Tensor:
        """The vector of every real token in the step."""
        words = self.words(step.input_ids)
        x = self.norm(self.token_type + words)
        masks = padding_masks(step)
        for layer in self.layers:
            x = layer(x, self.rotary, step.positions, step.groups, masks)
        return x[: step.real]
