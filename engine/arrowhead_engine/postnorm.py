# SPDX-License-Identifier: Apache-2.0
"""BERT and its kin in torch, on packed tokens, from their description. Read downward.

Letters: T packed tokens, B texts and S tokens of a group (packing.py), D width, H heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from arrowhead_engine.layers import Attention, Norm, attention, linear, norm, ragged
from arrowhead_engine.linear import Linear
from arrowhead_engine.packing import Step
from arrowhead_engine.sizes import PostNorm
from arrowhead_engine.tensors import Tensors


@dataclass(frozen=True)
class Layer:
    """Attention and feed-forward, a norm after each residual.

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

    def __call__(self, x: Tensor, attend: Attention) -> Tensor:
        """The next layer's x, [T, D] as this one's."""
        mixed = attend(self.qkv(x.to(self.dtype)), self.heads)  # [T, D]
        x = self.attention_norm(self.attention_out.add(mixed, x))
        return self.norm(self.down.add(self.up.gelu(x.to(self.dtype)), x))


class PostNormNetwork:
    """The network: `Step` -> token vectors float32 [T, D]."""

    def __init__(self, plan: PostNorm, most: int, weight: Tensors, dtype: torch.dtype) -> None:
        """Takes its tensors from `weight(name)`, converting once what the dtype asks for.

        `most` is the number of tokens of the longest text.
        """
        self.words = weight.rows(plan.words)
        first = plan.first_position
        self.position_embeddings = weight(plan.positions)[first : first + most].float()
        if plan.types is not None:
            # Every text is of token type 0, so that row is added to the positions once and for all.
            self.position_embeddings = self.position_embeddings + weight(plan.types)[0]
        self.norm = norm(weight, plan.norm, plan.eps)
        self.bias: Tensor | None = None
        if plan.distances is not None:
            # [H, S, S] for the longest text; shorter ones use its corner.
            name, table = plan.distances
            by_distance = torch.from_numpy(table(weight(name).float().cpu().numpy(), most))
            places = torch.arange(most)
            by_pair = by_distance[:, places[None, :] - places[:, None] + most - 1]
            self.bias = by_pair.to(self.words.table.device, dtype)
        self.dtype = dtype
        head = plan.width // plan.heads
        self.ragged = self.bias is None and ragged(self.words.table.device, dtype, head)
        self.layers = [_layer(plan, i, weight, dtype) for i in range(plan.layers)]

    def __call__(self, step: Step) -> Tensor:
        """The vector of every real token in the step."""
        words = self.words(step.input_ids)
        x = self.norm(F.embedding(step.positions, self.position_embeddings) + words)
        attend = attention(step, ragged=self.ragged, bias=self.bias)
        for layer in self.layers:
            x = layer(x, attend)
        return x[: step.real]


def _layer(plan: PostNorm, number: int, weight: Tensors, dtype: torch.dtype) -> Layer:
    at = plan.layer.format(number)

    def product(*parts: str) -> Linear:
        return linear(weight, *(at + plan.names[part] for part in parts), dtype=dtype)

    return Layer(
        qkv=product("query", "key", "value"),
        attention_out=product("attention_out"),
        attention_norm=norm(weight, at + plan.names["attention_norm"], plan.eps),
        up=product("up"),
        down=product("down"),
        norm=norm(weight, at + plan.names["norm"], plan.eps),
        heads=plan.heads,
        dtype=dtype,
    )
