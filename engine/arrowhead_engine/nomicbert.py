# SPDX-License-Identifier: Apache-2.0
"""NomicBERT (Nussbaum et al. 2024, arXiv:2402.01613): BERT with rotary positions and SwiGLU.

Same computation as HuggingFace's `transformers/models/nomic_bert/modeling_nomic_bert.py`; the names
of the tensors are the checkpoints', which that renames.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
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

# The spelling of the first checkpoints' `config.json`, and what else that must say there.
OLDER = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_inner": "intermediate_size",
    "n_positions": "max_position_embeddings",
    "layer_norm_epsilon": "layer_norm_eps",
    "rotary_emb_base": "rope_theta",
}
OLDER_ONLY = {
    "activation_function": "swiglu",
    "prenorm": False,
    "qkv_proj_bias": False,
    "mlp_fc1_bias": False,
    "mlp_fc2_bias": False,
    "use_rms_norm": False,
    "rotary_emb_fraction": 1.0,
    "rotary_emb_interleaved": False,
    "moe_every_n_layers": 0,
}


@dataclass(frozen=True)
class NomicBertConfig(EncoderSizes):
    """NomicBERT's sizes, in the older and the newer spelling of its `config.json`."""

    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    hidden_act: str = "silu"
    rope_theta: float = 1000.0

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> NomicBertConfig:
        """See `Sizes.from_dict`; what the older spelling says is put into these fields."""
        for name, known in OLDER_ONLY.items():
            if (raw.get(name) or False) != known and name in raw:
                raise UnsupportedModel(f"{name} is {raw[name]!r}; known is {known!r}")
        raw = {**{OLDER[name]: raw[name] for name in OLDER if name in raw}, **raw}
        if "max_trained_positions" in raw:  # beyond them positions are stretched, if at all
            longest = (raw["max_trained_positions"], raw["max_position_embeddings"])
            raw = {**raw, "max_position_embeddings": min(longest)}
        rope = raw.get("rope_parameters") or {}
        if rope.get("rope_type", "default") != "default":
            raise UnsupportedModel(f"rope_type is {rope['rope_type']!r}; known is 'default'")
        theta = float(rope.get("rope_theta") or raw.get("rope_theta") or cls.rope_theta)
        return super().from_dict({**raw, "rope_theta": theta})

    def __post_init__(self) -> None:
        """Refuses what would come out wrong."""
        super().__post_init__()
        self.only(hidden_act="silu")


@merged
def shapes(config: NomicBertConfig) -> Iterator[Shapes]:
    """Every tensor the network reads, by name, and its shape."""
    d, wide = config.hidden_size, config.intermediate_size
    yield {
        "embeddings.word_embeddings.weight": (config.vocab_size, d),
        "embeddings.token_type_embeddings.weight": (config.type_vocab_size, d),
    }
    yield norm_shapes("emb_ln", d)
    for i in range(config.num_hidden_layers):
        at = f"encoder.layers.{i}."
        yield linear_shapes(f"{at}attn.Wqkv", 3 * d, d, bias=False)
        yield linear_shapes(f"{at}attn.out_proj", d, d, bias=False)
        yield norm_shapes(f"{at}norm1", d)
        yield linear_shapes(f"{at}mlp.fc12", wide, d, bias=False)
        yield linear_shapes(f"{at}mlp.fc11", wide, d, bias=False)
        yield linear_shapes(f"{at}mlp.fc2", d, wide, bias=False)
        yield norm_shapes(f"{at}norm2", d)


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

    def __call__(self, x: Tensor, turn: Rotation, attend: Attention) -> Tensor:
        """The next layer's x, [T, D] as this one's."""
        qkv = turn(self.qkv(x.to(self.dtype)), self.heads)
        x = self.attention_norm(self.attention_out.add(attend(qkv, self.heads), x))
        gate, up = self.gate_up(x.to(self.dtype)).chunk(2, dim=-1)
        return self.norm(self.down.add(F.silu(gate) * up, x))


class NomicBert:
    """The network: `Step` -> token vectors float32 [T, D]."""

    def __init__(self, config: NomicBertConfig, weight: Tensors, dtype: torch.dtype) -> None:
        """Takes its tensors from `weight(name)`, converting once what the dtype asks for."""
        self.words = weight.rows("embeddings.word_embeddings.weight")
        self.token_type = weight("embeddings.token_type_embeddings.weight")[0].float()
        self.norm = norm(weight, "emb_ln", config.layer_norm_eps)
        head = config.hidden_size // config.num_attention_heads
        device = self.words.table.device
        self.rotary = Rotary(config.rope_theta, head, config.max_position_embeddings, device)
        self.ragged = ragged(device, dtype, head)
        self.layers = []
        for i in range(config.num_hidden_layers):
            at, eps = f"encoder.layers.{i}.", config.layer_norm_eps
            gate_up = [f"{at}mlp.fc12", f"{at}mlp.fc11"]
            self.layers.append(
                Layer(
                    qkv=linear(weight, f"{at}attn.Wqkv", dtype=dtype, bias=False),
                    attention_out=linear(weight, f"{at}attn.out_proj", dtype=dtype, bias=False),
                    attention_norm=norm(weight, f"{at}norm1", eps),
                    gate_up=linear(weight, *gate_up, dtype=dtype, bias=False),
                    down=linear(weight, f"{at}mlp.fc2", dtype=dtype, bias=False),
                    norm=norm(weight, f"{at}norm2", eps),
                    heads=config.num_attention_heads,
                    dtype=dtype,
                )
            )

    def __call__(self, step: Step) -> Tensor:
        """The vector of every real token in the step."""
        words = self.words(step.input_ids)
        x = self.norm(self.token_type + words)
        attend, turn = attention(step, ragged=self.ragged), self.rotary.at(step.positions)
        for layer in self.layers:
            x = layer(x, turn, attend)
        return x[: step.real]
