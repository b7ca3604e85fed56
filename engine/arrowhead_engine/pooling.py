# SPDX-License-Identifier: Apache-2.0
"""Token vectors -> one vector per text, in float32: pooling, then the model's dense heads.

Same as `sentence_transformers.models.Pooling` and `.Dense`, on packed tokens. Each pooling takes

- the token vectors float32 [T, D] that count,
- how many of them belong to each text, int64 [B], the texts lying end to end,
- the place in its text of each text's first token that counts, int64 [B]: 0, or the length of a
  prompt that is left out,

and gives [B, D].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from arrowhead_engine.errors import UnsupportedModel
from arrowhead_engine.layers import Shapes, linear_shapes
from arrowhead_engine.spec import positive_int
from arrowhead_engine.tensors import Tensors

Pooling = Callable[[Tensor, Tensor, Tensor], Tensor]


def mean(tokens: Tensor, lengths: Tensor, first: Tensor) -> Tensor:
    """The mean of a text's token vectors, special tokens included."""
    return torch.segment_reduce(tokens, "mean", lengths=lengths, unsafe=True)


def cls(tokens: Tensor, lengths: Tensor, first: Tensor) -> Tensor:
    """The vector of a text's first token."""
    return tokens.index_select(0, lengths.cumsum(0) - lengths)


def mean_sqrt_len(tokens: Tensor, lengths: Tensor, first: Tensor) -> Tensor:
    """The sum of a text's token vectors over the square root of their number."""
    return mean(tokens, lengths, first) * lengths.sqrt()[:, None]


def weighted_mean(tokens: Tensor, lengths: Tensor, first: Tensor) -> Tensor:
    """The mean of a text's token vectors, each weighing its place in the text, counted from 1."""
    starts = lengths.cumsum(0) - lengths - first
    weights = torch.arange(1, len(tokens) + 1, device=tokens.device)
    weights = weights - starts.repeat_interleave(lengths)
    total = mean(tokens * weights[:, None], lengths, first) * lengths[:, None]
    return total / (lengths * (2 * first + lengths + 1) / 2)[:, None]


def maximum(tokens: Tensor, lengths: Tensor, first: Tensor) -> Tensor:
    """The largest value of each component over a text's tokens."""
    return torch.segment_reduce(tokens, "max", lengths=lengths, unsafe=True)


def last(tokens: Tensor, lengths: Tensor, first: Tensor) -> Tensor:
    """The vector of a text's last token."""
    return tokens.index_select(0, lengths.cumsum(0) - 1)


# By sentence-transformers' names.
POOLINGS: dict[str, Pooling] = {
    "mean": mean,
    "cls": cls,
    "max": maximum,
    "mean_sqrt_len_tokens": mean_sqrt_len,
    "weightedmean": weighted_mean,
    "lasttoken": last,
}


def poolings(name: str) -> list[Pooling]:
    """The poolings in a spec's `pooling`: one, or several joined by "+", side by side in D.

    Raises:
        UnsupportedModel: one of them is not known.
    """
    modes = name.split("+")
    if unknown := [mode for mode in modes if mode not in POOLINGS]:
        raise UnsupportedModel(
            f"pooling {unknown[0]!r}; this engine knows {', '.join(POOLINGS)}, and several of them "
            "joined by '+'"
        )
    return [POOLINGS[mode] for mode in modes]


def normalize(vectors: Tensor) -> Tensor:
    """Scales each row of [B, D] to length 1 (a zero row stays zero)."""
    return F.normalize(vectors, dim=-1)


# By the names of torch.nn's classes, which sentence-transformers writes down.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "Identity": lambda x: x,
    "Tanh": torch.tanh,
    "ReLU": F.relu,
    "GELU": F.gelu,
    "SiLU": F.silu,
    "Sigmoid": torch.sigmoid,
}


@dataclass(frozen=True)
class Dense:
    """A dense head: activation(x Wᵀ + b), on one vector a text and so always in float32.

    Attributes:
        in_features, out_features: widths. bias: whether there is one.
        activation: a key of `ACTIVATIONS`.
    """

    in_features: int
    out_features: int
    bias: bool
    activation: str

    def __post_init__(self) -> None:
        """Refuses what is no head.

        Raises:
            UnsupportedModel: names the field.
        """
        positive_int("in_features", self.in_features)
        positive_int("out_features", self.out_features)
        if self.activation not in ACTIVATIONS:
            raise UnsupportedModel(
                f"a dense head's activation is {self.activation!r}; known are "
                f"{', '.join(ACTIVATIONS)}"
            )

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """[B, in_features] -> [B, out_features]."""
        return ACTIVATIONS[self.activation](F.linear(x, weight, bias))


class Heads:
    """A model's dense heads, one after the other."""

    def __init__(self, specs: list[dict[str, Any]], width: int) -> None:
        """Reads a spec's `heads`; `width` is what the pooling gives.

        Raises:
            UnsupportedModel: a head is not known, or does not fit the one before.
        """
        try:
            self.layers = [Dense(**spec) for spec in specs]
        except TypeError as error:
            raise UnsupportedModel(f"heads is not one this engine knows: {error}") from error
        for layer in self.layers:
            if layer.in_features != width:
                raise UnsupportedModel(
                    f"a dense head takes {layer.in_features} features, it is given {width}"
                )
            width = layer.out_features
        self.width = width

    @classmethod
    def after(cls, pooling: str, specs: list[dict[str, Any]], width: int) -> Heads:
        """The heads behind a spec's `pooling` of token vectors of that width.

        Raises:
            UnsupportedModel: a pooling or head is not known, or one does not fit the one before.
        """
        return cls(specs, width * len(poolings(pooling)))

    def shapes(self) -> Shapes:
        """Name and shape of the heads' tensors."""
        table: Shapes = {}
        for name, layer in self._named():
            table |= linear_shapes(name, layer.out_features, layer.in_features, bias=layer.bias)
        return table

    def load(self, weight: Tensors) -> Callable[[Tensor], Tensor]:
        """The heads over their tensors: [B, D] -> [B, width]."""
        parts = [
            (
                layer,
                weight(f"{name}.weight").float(),
                weight(f"{name}.bias").float() if layer.bias else None,
            )
            for name, layer in self._named()
        ]

        def apply(x: Tensor) -> Tensor:
            for layer, w, b in parts:
                x = layer(x, w, b)
            return x

        return apply

    def _named(self) -> Iterator[tuple[str, Dense]]:
        for i, layer in enumerate(self.layers):
            yield f"dense.{i}.linear", layer
