# SPDX-License-Identifier: Apache-2.0
"""ModernBERT (Warner et al. 2024, arXiv:2412.13663): rotary positions, norms first, gates.

Same computation as HuggingFace's `transformers/models/modernbert/modeling_modernbert.py`. Every
third layer looks at the whole text, the others at a window of tokens around each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from arrowhead_engine.errors import UnsupportedModel
from arrowhead_engine.layers import (
    Attention,
    Norm,
    Rotary,
    Rotation,
    attention,
    linear,
    norm,
    ragged,
)
from arrowhead_engine.linear import Linear
from arrowhead_engine.packing import Step
from arrowhead_engine.sizes import EncoderSizes, Shapes, linear_shapes, merged, norm_shapes
from arrowhead_engine.tensors import Tensors

GLOBAL, LOCAL = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class ModernBertConfig(EncoderSizes):
    """ModernBERT's sizes, in the older and the newer spelling of its `config.json`."""

    norm_eps: float = 1e-5
    hidden_activation: str = "gelu"
    norm_bias: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    local_attention: int = 128
    global_rope_theta: float = 160_000.0
    local_rope_theta: float = 10_000.0
    layer_types: list[str] = field(default_factory=list)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> ModernBertConfig:
        """See `Sizes.from_dict`; what the newer spelling says is put into these fields."""
        every = raw.get("global_attn_every_n_layers", 3)
        kinds = raw.get("layer_types") or [
            LOCAL if i % every else GLOBAL for i in range(raw.get("num_hidden_layers", 0))
        ]
        thetas = {}
        for kind, name in ((GLOBAL, "global_rope_theta"), (LOCAL, "local_rope_theta")):
            rope = (raw.get("rope_parameters") or {}).get(kind) or {}
            if rope.get("rope_type", "default") != "default":
                raise UnsupportedModel(
                    f"{kind} has rope_type {rope['rope_type']!r}; known: default"
                )
            thetas[name] = float(rope.get("rope_theta") or raw.get(name) or getattr(cls, name))
        return super().from_dict({**raw, **thetas, "layer_types": kinds})

    def __post_init__(self) -> None:
        """Refuses what would come out wrong."""
        super().__post_init__()
        self.only(hidden_activation="gelu")
        known = set(self.layer_types) <= {GLOBAL, LOCAL}
        if not known or len(self.layer_types) != self.num_hidden_layers:
            raise UnsupportedModel(
                f"layer_types is {self.layer_types!r}; wanted one for each layer"
            )


@merged
def shapes(config: ModernBertConfig) -> Iterator[Shapes]:
    """Every tensor the network reads, by name, and its shape."""
    d, wide = config.hidden_size, config.intermediate_size
    yield {"embeddings.tok_embeddings.weight": (config.vocab_size, d)}
    yield norm_shapes("embeddings.norm", d, bias=config.norm_bias)
    for i in range(config.num_hidden_layers):
        at = f"layers.{i}."
        if i:  # the first layer's input was normalised already
            yield norm_shapes(f"{at}attn_norm", d, bias=config.norm_bias)
        yield linear_shapes(f"{at}attn.Wqkv", 3 * d, d, bias=config.attention_bias)
        yield linear_shapes(f"{at}attn.Wo", d, d, bias=config.attention_bias)
        yield norm_shapes(f"{at}mlp_norm", d, bias=config.norm_bias)
        yield linear_shapes(f"{at}mlp.Wi", 2 * wide, d, bias=config.mlp_bias)
        yield linear_shapes(f"{at}mlp.Wo", d, wide, bias=config.mlp_bias)
    yield norm_shapes("final_norm", d, bias=config.norm_bias)


@dataclass(frozen=True)
class Layer:
    """Norm, attention, residual; norm, gated feed-forward, residual. `x` is float32."""

    attention_norm: Norm | None
    qkv: Linear
    attention_out: Linear
    norm: Norm
    gate_up: Linear
    down: Linear
    heads: int
    dtype: torch.dtype

    def __call__(self, x: Tensor, turn: Rotation, attend: Attention) -> Tensor:
        """The next layer's x, [T, D] as this one's."""
        h = self.attention_norm(x) if self.attention_norm else x
        qkv = turn(self.qkv(h.to(self.dtype)), self.heads)
        x = self.attention_out.add(attend(qkv, self.heads), x)
        gate, up = self.gate_up(self.norm(x).to(self.dtype)).chunk(2, dim=-1)
        return self.down.add(F.gelu(gate) * up, x)


class ModernBert:
    """The network: `Step` -> token vectors float32 [T, D]."""

    def __init__(self, config: ModernBertConfig, weight: Tensors, dtype: torch.dtype) -> None:
        """Takes its tensors from `weight(name)`, converting once what the dtype asks for."""
        self.words = weight.rows("embeddings.tok_embeddings.weight")
        device, eps, biased = self.words.table.device, config.norm_eps, config.norm_bias
        head = config.hidden_size // config.num_attention_heads
        thetas = {GLOBAL: config.global_rope_theta, LOCAL: config.local_rope_theta}
        self.rotaries = {
            kind: Rotary(theta, head, config.max_position_embeddings, device)
            for kind, theta in thetas.items()
        }
        self.window = config.local_attention // 2  # tokens before, and as many after
        self.kinds = config.layer_types
        self.norm = norm(weight, "embeddings.norm", eps, bias=biased)
        self.ragged = ragged(device, dtype, head)
        self.layers = []
        for i in range(config.num_hidden_layers):
            at = f"layers.{i}."
            self.layers.append(
                Layer(
                    attention_norm=norm(weight, f"{at}attn_norm", eps, bias=biased) if i else None,
                    qkv=linear(weight, f"{at}attn.Wqkv", dtype=dtype, bias=config.attention_bias),
                    attention_out=linear(
                        weight, f"{at}attn.Wo", dtype=dtype, bias=config.attention_bias
                    ),
                    norm=norm(weight, f"{at}mlp_norm", eps, bias=biased),
                    gate_up=linear(weight, f"{at}mlp.Wi", dtype=dtype, bias=config.mlp_bias),
                    down=linear(weight, f"{at}mlp.Wo", dtype=dtype, bias=config.mlp_bias),
                    heads=config.num_attention_heads,
                    dtype=dtype,
                )
            )
        self.final_norm = norm(weight, "final_norm", eps, bias=biased)

    def __call__(self, step: Step) -> Tensor:
        """The vector of every real token in the step."""
        x = self.norm(self.words(step.input_ids))
        attend = {
            GLOBAL: attention(step, ragged=self.ragged),
            LOCAL: attention(step, ragged=self.ragged, window=self.window),
        }
        turn = {kind: rotary.at(step.positions) for kind, rotary in self.rotaries.items()}
        for kind, layer in zip(self.kinds, self.layers, strict=True):
            x = layer(x, turn[kind], attend[kind])
        return self.final_norm(x)[: step.real]
