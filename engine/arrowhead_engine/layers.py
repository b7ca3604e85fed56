# SPDX-License-Identifier: Apache-2.0
"""What the networks share in torch: norms, linear layers, attention on packed tokens.

Letters: T packed tokens, B texts and S tokens of a group (packing.py), D width, H heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from arrowhead_engine.linear import Linear, make
from arrowhead_engine.packing import Group, Step
from arrowhead_engine.tensors import Tensors


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
