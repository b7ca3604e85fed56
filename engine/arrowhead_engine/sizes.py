# SPDX-License-Identifier: Apache-2.0
"""What a network is told in: its sizes, its tensors' names and shapes. Imports no torch.

Letters: T packed tokens, B texts, S tokens of a text, D width, H heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from functools import wraps
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from arrowhead_engine.errors import UnsupportedModel
from arrowhead_engine.spec import positive_int

Shapes = dict[str, tuple[int, ...]]
C = TypeVar("C", bound="Sizes")


@dataclass(frozen=True)
class Sizes:
    """Base of the configurations: their fields are those of HuggingFace's `config.json`."""

    def __post_init__(self) -> None:
        """Refuses sizes that are none.

        Raises:
            UnsupportedModel: names the first.
        """
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "int":
                positive_int(field.name, value)
            elif field.type == "float" and not isinstance(value, float):
                raise UnsupportedModel(f"{field.name} is {value!r}; wanted a number")

    @classmethod
    def from_dict(cls: type[C], raw: Mapping[str, Any]) -> C:
        """Picks the fields out of a `config.json`; what it leaves out has HuggingFace's default.

        Raises:
            UnsupportedModel: a size is missing, or asks for something this network is not.
        """
        for field in fields(cls):
            if field.default is MISSING and field.name not in raw:
                raise UnsupportedModel(f"config.json has no {field.name}")
        return cls(**{field.name: raw[field.name] for field in fields(cls) if field.name in raw})

    def to_dict(self) -> dict[str, Any]:
        """The sizes as JSON-ready values."""
        return asdict(self)

    def only(self, **known: object) -> None:
        """Refuses every other value of the fields named.

        Raises:
            UnsupportedModel: names the field, its value and the one that is known.
        """
        for name, wanted in known.items():
            if getattr(self, name) != wanted:
                raise UnsupportedModel(f"{name} is {getattr(self, name)!r}; known is {wanted!r}")

    def divisible(self, width: int, heads: int) -> None:
        """Refuses heads that do not share the width evenly.

        Raises:
            UnsupportedModel: says so.
        """
        if width % heads:
            raise UnsupportedModel(f"a width of {width} is not a multiple of {heads} heads")


@dataclass(frozen=True)
class EncoderSizes(Sizes):
    """The sizes that BERT and most of its kin have, under the same names."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int

    def __post_init__(self) -> None:
        """Refuses sizes that are none, or do not fit each other."""
        super().__post_init__()
        self.divisible(self.hidden_size, self.num_attention_heads)

    @property
    def width(self) -> int:
        """D."""
        return self.hidden_size

    @property
    def most_tokens(self) -> int:
        """The longest text the network takes."""
        return self.max_position_embeddings


@dataclass(frozen=True)
class PostNorm:
    """BERT and its kin: embeddings, then layers of attention and feed-forward, a norm after each.

    Attributes:
        words, positions, norm: names of the tables, and of the norm of their sum.
        first_position: the row of the position table that belongs to a text's first token.
        types: name of the table of token types, of which every text has the first; or None.
        layer: what the names of a layer's tensors begin with, a place in it for its number.
        names: the rest of the name of each part: query, key, value, attention_out,
            attention_norm, up, down, norm.
        layers, width, heads, wide, eps: its sizes; `wide` is between up and down.
        distances: name of a table [buckets, H], and what makes of it and a length S the float32
            [H, 2 S - 1] that is added to scores, by key's minus query's place plus S - 1.
    """

    words: str
    positions: str
    first_position: int
    types: str | None
    norm: str
    layer: str
    names: Mapping[str, str]
    layers: int
    width: int
    heads: int
    wide: int
    eps: float
    distances: tuple[str, Callable[[npt.NDArray[Any], int], npt.NDArray[np.float32]]] | None = None

    def layer_shapes(self) -> Iterator[Shapes]:
        """Name and shape of the tensors of norm and layers."""
        yield norm_shapes(self.norm, self.width)
        for i in range(self.layers):
            at = self.layer.format(i)
            for part in ("query", "key", "value", "attention_out"):
                yield linear_shapes(at + self.names[part], self.width, self.width)
            yield norm_shapes(at + self.names["attention_norm"], self.width)
            yield linear_shapes(at + self.names["up"], self.wide, self.width)
            yield linear_shapes(at + self.names["down"], self.width, self.wide)
            yield norm_shapes(at + self.names["norm"], self.width)


def linear_shapes(name: str, rows: int, columns: int, *, bias: bool = True) -> Shapes:
    """Name and shape of a linear layer's tensors."""
    table: Shapes = {f"{name}.weight": (rows, columns)}
    return table | {f"{name}.bias": (rows,)} if bias else table


def norm_shapes(name: str, width: int, *, bias: bool = True) -> Shapes:
    """Name and shape of a norm's tensors."""
    return {f"{name}.{part}": (width,) for part in ("weight", "bias")[: 1 + bias]}


def merged(parts: Callable[[C], Iterator[Shapes]]) -> Callable[[C], Shapes]:
    """Decorates a generator of tables, so that it gives one table."""

    @wraps(parts)
    def table(config: C) -> Shapes:
        return {name: shape for part in parts(config) for name, shape in part.items()}

    return table
