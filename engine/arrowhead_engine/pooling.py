# SPDX-License-Identifier: Apache-2.0
"""What follows the network: the names of poolings, a model's dense heads, normalising. In float32.

Same as `sentence_transformers.models.Pooling` and `.Dense`. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from arrowhead_engine.errors import UnsupportedModel
from arrowhead_engine.sizes import Shapes, linear_shapes
from arrowhead_engine.spec import positive_int

Vectors = npt.NDArray[np.float32]

# By sentence-transformers' names, in the order by which the kernels number them.
POOLINGS = ("mean", "cls", "max", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")


def poolings(name: str) -> list[str]:
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
    return modes


def normalize(vectors: Vectors) -> Vectors:
    """Scales each row of [B, D] to length 1 (a zero row stays zero)."""
    lengths = np.sqrt(np.einsum("bd,bd->b", vectors, vectors))
    scaled: Vectors = vectors / np.maximum(lengths, np.float32(1e-12))[:, None]
    return scaled


_erf = np.vectorize(math.erf, otypes=[np.float32])


def _sigmoid(x: Vectors) -> Vectors:
    y: Vectors = (1 + np.tanh(x / 2)) / 2  # 1 / (1 + e^-x) would overflow on its way
    return y


# By the names of torch.nn's classes, which sentence-transformers writes down.
ACTIVATIONS: dict[str, Callable[[Vectors], Vectors]] = {
    "Identity": lambda x: x,
    "Tanh": np.tanh,
    "ReLU": lambda x: np.maximum(x, 0),
    "GELU": lambda x: x * (1 + _erf(x / math.sqrt(2))) / 2,
    "SiLU": lambda x: x * _sigmoid(x),
    "Sigmoid": _sigmoid,
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

    def __call__(self, x: Vectors, weight: Vectors, bias: Vectors | None) -> Vectors:
        """[B, in_features] -> [B, out_features]."""
        y = x @ weight.T
        return ACTIVATIONS[self.activation](y if bias is None else y + bias)


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

    def load(self, weight: Callable[[str], Vectors]) -> Callable[[Vectors], Vectors]:
        """The heads over their tensors, float32: [B, D] -> [B, width]."""
        parts = [
            (layer, weight(f"{name}.weight"), weight(f"{name}.bias") if layer.bias else None)
            for name, layer in self._named()
        ]

        def apply(x: Vectors) -> Vectors:
            for layer, w, b in parts:
                x = layer(x, w, b)
            return x

        return apply

    def _named(self) -> Iterator[tuple[str, Dense]]:
        for i, layer in enumerate(self.layers):
            yield f"dense.{i}.linear", layer
