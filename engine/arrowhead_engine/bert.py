# SPDX-License-Identifier: Apache-2.0
"""BERT (Devlin et al. 2018, arXiv:1810.04805), on packed tokens. Read downward.

Same computation as HuggingFace's `transformers/models/bert/modeling_bert.py`, without the pooler,
in inference only. Weight names are the checkpoint's own.

Letters: T packed tokens, B texts and S tokens of a group (packing.py), D width, H heads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from arrowhead_engine.errors import UnsupportedModel
from arrowhead_engine.linear import Linear, make
from arrowhead_engine.packing import Group, Step
from arrowhead_engine.spec import positive_int


@dataclass(frozen=True)
class BertConfig:
    """The sizes, under the names (and with the defaults) of HuggingFace's `config.json`."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    hidden_act: str = "gelu"
    position_embedding_type: str = "absolute"

    def __post_init__(self) -> None:
        """Refuses sizes that are none, and variants that would come out wrong.

        Raises:
            UnsupportedModel: names the first.
        """
        for name, value in vars(self).items():
            if self.__annotations__[name] == "int":
                positive_int(name, value)
        if not isinstance(self.layer_norm_eps, float):
            raise UnsupportedModel(f"layer_norm_eps is {self.layer_norm_eps!r}; wanted a number")
        if self.hidden_act != "gelu":
            raise UnsupportedModel(
                f"hidden_act {self.hidden_act!r}; this engine knows the exact 'gelu'"
            )
        if self.position_embedding_type != "absolute":
            raise UnsupportedModel(
                f"position_embedding_type {self.position_embedding_type!r}; known is 'absolute'"
            )
        if self.hidden_size % self.num_attention_heads:
            raise UnsupportedModel(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                f"{self.num_attention_heads}"
            )

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> BertConfig:
        """Picks its fields out of a `config.json`.

        Raises:
            UnsupportedModel: a size is missing, or asks for something BERT this is not.
        """
        known = {name: raw[name] for name in cls.__dataclass_fields__ if name in raw}
        try:
            return cls(**known)
        except TypeError as error:
            raise UnsupportedModel(f"config.json: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """The sizes as JSON-ready values."""
        return asdict(self)


def shapes(config: BertConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor the network reads, by name, and its shape."""
    d, wide = config.hidden_size, config.intermediate_size
    table: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (config.vocab_size, d),
        "embeddings.position_embeddings.weight": (config.max_position_embeddings, d),
        "embeddings.token_type_embeddings.weight": (config.type_vocab_size, d),
        "embeddings.LayerNorm.weight": (d,),
        "embeddings.LayerNorm.bias": (d,),
    }
    for i in range(config.num_hidden_layers):
        layer = f"encoder.layer.{i}."
        for name, rows, columns in (
            ("attention.self.query", d, d),
            ("attention.self.key", d, d),
            ("attention.self.value", d, d),
            ("attention.output.dense", d, d),
            ("intermediate.dense", wide, d),
            ("output.dense", d, wide),
        ):
            table[f"{layer}{name}.weight"] = (rows, columns)
            table[f"{layer}{name}.bias"] = (rows,)
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            table[f"{layer}{name}.weight"] = (d,)
            table[f"{layer}{name}.bias"] = (d,)
    return table


@dataclass(frozen=True)
class Norm:
    """Layer normalisation over D, in float32."""

    weight: Tensor
    bias: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        """Normalises each row of x [T, D]."""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


@dataclass(frozen=True)
class Layer:
    """Attention and feed-forward, each followed by its residual and norm.

    Products are in the compute dtype; `x`, the residual that runs through all layers, is float32.
    """

    qkv: Linear
    attention_out: Linear
    attention_norm: Norm
    up: Linear
    down: Linear
    norm: Norm
    heads: int
    dtype: torch.dtype

    def __call__(self, x: Tensor, groups: tuple[Group, ...]) -> Tensor:
        """The next layer's x, [T, D] as this one's."""
        mixed = attention(self.qkv(x.to(self.dtype)), groups, self.heads)  # [T, D]
        x = self.attention_norm(self.attention_out.add(mixed, x))
        return self.norm(self.down.add(self.up.gelu(x.to(self.dtype)), x))


def attention(qkv: Tensor, groups: tuple[Group, ...], heads: int) -> Tensor:
    """Each token looks at those of its own text: qkv [T, 3D] -> [T, D]; the tail gets zeros."""
    parts = [_attend(qkv[group.start : group.stop], group, heads) for group in groups]
    tail = len(qkv) - groups[-1].stop
    if tail:
        parts.append(qkv.new_zeros(tail, qkv.shape[1] // 3))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _attend(qkv: Tensor, group: Group, heads: int) -> Tensor:
    if group.gather is not None:
        qkv = qkv.index_select(0, group.gather)
    width = qkv.shape[1] // 3
    # [B*S, 3D] -> 3 x [B, H, S, D/H], all views
    q, k, v = (
        qkv.view(group.texts, group.length, 3, heads, width // heads)
        .permute(2, 0, 3, 1, 4)
        .unbind(0)
    )
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=group.mask)  # [B, H, S, D/H]
    out = out.transpose(1, 2).reshape(group.texts * group.length, width)
    return out if group.scatter is None else out.index_select(0, group.scatter)


class Bert:
    """The network: `Step` -> token vectors float32 [T, D]."""

    def __init__(
        self, config: BertConfig, weight: Callable[[str], Tensor], dtype: torch.dtype
    ) -> None:
        """Takes its tensors from `weight(name)`, converting once what the dtype asks for."""

        def linear(*names: str) -> Linear:
            w = torch.cat([weight(f"{name}.weight") for name in names])
            return make(w, torch.cat([weight(f"{name}.bias") for name in names]), dtype)

        def norm(name: str) -> Norm:
            return Norm(
                weight(f"{name}.weight").float(),
                weight(f"{name}.bias").float(),
                config.layer_norm_eps,
            )

        # Stays as stored, in the map: only the rows that texts touch ever become resident.
        self.word_embeddings = weight("embeddings.word_embeddings.weight")
        # Every text is of token type 0, so that row is added to the positions once and for all.
        self.position_embeddings = (
            weight("embeddings.position_embeddings.weight").float()
            + weight("embeddings.token_type_embeddings.weight")[0]
        )
        self.norm = norm("embeddings.LayerNorm")
        self.layers = []
        for i in range(config.num_hidden_layers):
            at = f"encoder.layer.{i}."
            self.layers.append(
                Layer(
                    qkv=linear(
                        *(f"{at}attention.self.{part}" for part in ("query", "key", "value"))
                    ),
                    attention_out=linear(f"{at}attention.output.dense"),
                    attention_norm=norm(f"{at}attention.output.LayerNorm"),
                    up=linear(f"{at}intermediate.dense"),
                    down=linear(f"{at}output.dense"),
                    norm=norm(f"{at}output.LayerNorm"),
                    heads=config.num_attention_heads,
                    dtype=dtype,
                )
            )

    def __call__(self, step: Step) -> Tensor:
        """The vector of every real token in the step."""
        words = F.embedding(step.input_ids, self.word_embeddings)
        x = self.norm(self.position_embeddings[step.positions] + words)
        for layer in self.layers:
            x = layer(x, step.groups)
        return x[: step.groups[-1].stop]
