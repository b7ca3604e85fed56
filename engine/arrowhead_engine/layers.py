# SPDX-License-Identifier: Apache-2.0
"""What the networks share: sizes, norms, attention on packed tokens, the post-norm layer.

Letters: T packed tokens, B texts and S tokens of a group (packing.py), D width, H heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from functools import wraps
from typing import Any, TypeVar

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from arrowhead_engine.errors import UnsupportedModel
from arrowhead_engine.linear import Linear, make
from arrowhead_engine.packing import Group, Step
from arrowhead_engine.spec import positive_int
from arrowhead_engine.tensors import Tensors

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
class Norm:
    """Layer normalisation over D, in float32; some networks have no bias."""

    weight: Tensor
    bias: Tensor | None
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        """Normalises each row of x [T, D]."""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


def norm(weight: Tensors, name: str, eps: float, *, bias: bool = True) -> Norm:
    """The norm of that name."""
    b = weight(f"{name}.bias").float() if bias else None
    return Norm(weight(f"{name}.weight").float(), b, eps)


def linear(weight: Tensors, *names: str, dtype: torch.dtype, bias: bool = True) -> Linear:
    """The linear layers of those names as one, their outputs side by side."""
    w = torch.cat([weight(f"{name}.weight") for name in names])
    b = torch.cat([weight(f"{name}.bias") for name in names]) if bias else None
    return make(w, b, dtype)


@dataclass(frozen=True)
class PostNormLayer:
    """The layer of BERT and its kin: attention and feed-forward, a norm after each residual.

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

    def __call__(
        self, x: Tensor, groups: Sequence[Group], masks: Sequence[Tensor | None]
    ) -> Tensor:
        """The next layer's x, [T, D] as this one's; a mask for each group."""
        mixed = attention(self.qkv(x.to(self.dtype)), groups, masks, self.heads)  # [T, D]
        x = self.attention_norm(self.attention_out.add(mixed, x))
        return self.norm(self.down.add(self.up.gelu(x.to(self.dtype)), x))


def post_norm_layers(
    weight: Tensors,
    at: str,
    names: Mapping[str, str],
    *,
    count: int,
    heads: int,
    eps: float,
    dtype: torch.dtype,
) -> list[PostNormLayer]:
    """The layers whose tensors begin with `at`, a place in it for the layer's number.

    `names` has the rest of each part's name.
    """
    return [
        _post_norm_layer(weight, at.format(i), names, heads=heads, eps=eps, dtype=dtype)
        for i in range(count)
    ]


def _post_norm_layer(
    weight: Tensors,
    at: str,
    names: Mapping[str, str],
    *,
    heads: int,
    eps: float,
    dtype: torch.dtype,
) -> PostNormLayer:

    def product(*parts: str) -> Linear:
        return linear(weight, *(at + names[part] for part in parts), dtype=dtype)

    return PostNormLayer(
        qkv=product("query", "key", "value"),
        attention_out=product("attention_out"),
        attention_norm=norm(weight, at + names["attention_norm"], eps),
        up=product("up"),
        down=product("down"),
        norm=norm(weight, at + names["norm"], eps),
        heads=heads,
        dtype=dtype,
    )


def post_norm_shapes(at: str, names: Mapping[str, str], width: int, wide: int) -> Shapes:
    """Name and shape of such a layer's tensors."""
    table: Shapes = {}
    for part in ("query", "key", "value", "attention_out"):
        table |= linear_shapes(at + names[part], width, width)
    table |= norm_shapes(at + names["attention_norm"], width)
    table |= linear_shapes(at + names["up"], wide, width)
    table |= linear_shapes(at + names["down"], width, wide)
    return table | norm_shapes(at + names["norm"], width)


def attention(
    qkv: Tensor, groups: Sequence[Group], masks: Sequence[Tensor | None], heads: int
) -> Tensor:
    """Each token looks at those of its own text: qkv [T, 3D] -> [T, D]; the tail gets zeros.

    `masks` has for each group what to add to the scores, or which of them count (bool),
    broadcast to [B, H, S, S]; None where all of them count.
    """
    parts = [
        _attend(qkv[group.start : group.stop], group, mask, heads)
        for group, mask in zip(groups, masks, strict=True)
    ]
    tail = len(qkv) - groups[-1].stop
    if tail:
        parts.append(qkv.new_zeros(tail, qkv.shape[1] // 3))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _attend(qkv: Tensor, group: Group, mask: Tensor | None, heads: int) -> Tensor:
    if group.gather is not None:
        qkv = qkv.index_select(0, group.gather)
    width = qkv.shape[1] // 3
    # [B*S, 3D] -> 3 x [B, H, S, D/H], all views
    q, k, v = (
        qkv.view(group.texts, group.length, 3, heads, width // heads)
        .permute(2, 0, 3, 1, 4)
        .unbind(0)
    )
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # [B, H, S, D/H]
    out = out.transpose(1, 2).reshape(group.texts * group.length, width)
    return out if group.scatter is None else out.index_select(0, group.scatter)


def padding_masks(step: Step) -> list[Tensor | None]:
    """For each group which places are real; None where all are."""
    return [group.mask for group in step.groups]


class Rotary:
    """Rotary positions (Su et al. 2021, arXiv:2104.09864), halves rotated as in GPT-NeoX."""

    def __init__(self, base: float, width: int, positions: int, device: torch.device) -> None:
        """Tables for heads of `width` and texts of up to `positions` tokens."""
        inverse = 1.0 / base ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
        angles = torch.arange(positions, dtype=torch.float32)[:, None] * inverse
        self.cos, self.sin = angles.cos().to(device), angles.sin().to(device)  # [positions, w / 2]

    def __call__(self, qkv: Tensor, positions: Tensor, heads: int) -> Tensor:
        """Turns queries and keys of qkv [T, 3D] by their tokens' positions [T]."""
        width = self.cos.shape[1] * 2
        parts = qkv.view(len(qkv), 3, heads, width)
        cos, sin = self.cos[positions][:, None, None], self.sin[positions][:, None, None]
        first, second = parts[:, :2].float().chunk(2, dim=-1)  # [T, 2, H, width / 2]
        turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
        return torch.cat([turned.to(qkv.dtype), parts[:, 2:]], dim=1).view_as(qkv)


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
