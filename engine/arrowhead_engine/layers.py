# SPDX-License-Identifier: Apache-2.0
"""What the networks share in torch: norms, linear layers, attention on packed tokens.

Letters: T packed tokens, B texts and S tokens of a group (packing.py), D width, H heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

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


def _flash() -> Any:
    """FlashAttention on texts of any length, by torch's public name for it; None where missing."""
    if torch.__version__ < "2.11":
        return None  # 2.10's knows no window
    return import_module("torch.nn.attention.varlen").varlen_attn


varlen_attn = _flash()

# Each token looks at those of its own text: (qkv [T, 3D], H) -> [T, D]. The tail is anybody's.
Attention = Callable[[Tensor, int], Tensor]


def ragged(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Whether attention with heads of `width` takes texts of any length as they lie.

    FlashAttention does, on a GPU.
    """
    return (
        device.type == "cuda"
        and varlen_attn is not None
        and dtype in (torch.float16, torch.bfloat16)
        and width % 8 == 0
        and width <= 256
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def attention(
    step: Step, *, ragged: bool, window: int | None = None, bias: Tensor | None = None
) -> Attention:
    """How the tokens of a step attend.

    Args:
        step: the texts.
        ragged: as they lie, without a bias.
        window: how far a token looks to either side, if not everywhere.
        bias: [H, S, S], added to scores by query's and key's place, if anything is.
    """
    if ragged:
        return _as_they_lie(step, -1 if window is None else window)
    device = step.input_ids.device
    return _grouped(step.groups, [_mask(group, window, bias, device) for group in step.groups])


def _as_they_lie(step: Step, window: int) -> Attention:
    starts, longest = step.starts, step.longest

    def attend(qkv: Tensor, heads: int) -> Tensor:
        q, k, v = qkv.view(len(qkv), 3, heads, -1).unbind(1)  # [T, H, D/H], views
        out: Tensor = varlen_attn(
            q, k, v, starts, starts, longest, longest, window_size=(window, window)
        )
        return out.reshape(len(qkv), -1)

    return attend


def _grouped(groups: Sequence[Group], masks: Sequence[Tensor | None]) -> Attention:
    def attend(qkv: Tensor, heads: int) -> Tensor:
        parts = [
            _attend(qkv[group.start : group.stop], group, mask, heads)
            for group, mask in zip(groups, masks, strict=True)
        ]
        tail = len(qkv) - groups[-1].stop
        if tail:
            parts.append(qkv.new_zeros(tail, qkv.shape[1] // 3))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    return attend


def _mask(
    group: Group, window: int | None, bias: Tensor | None, device: torch.device
) -> Tensor | None:
    """What to add to a group's scores, or which of them count (bool), or None where all do."""
    if bias is not None:
        own = bias[:, : group.length, : group.length][None]
        return own if group.mask is None else torch.where(group.mask, own, float("-inf"))
    if window is None or group.length <= window + 1:  # every token is near every other
        return group.mask
    places = torch.arange(group.length, device=device)
    near = (places[:, None] - places[None, :]).abs() <= window  # [S, S]
    return near if group.mask is None else near & group.mask


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


# Turns queries and keys by their tokens' positions: (qkv [T, 3D], H) -> the same.
Rotation = Callable[[Tensor, int], Tensor]


class Rotary:
    """Rotary positions (Su et al. 2021, arXiv:2104.09864), halves rotated as in GPT-NeoX."""

    def __init__(self, base: float, width: int, positions: int, device: torch.device) -> None:
        """Tables for heads of `width` and texts of up to `positions` tokens."""
        inverse = 1.0 / base ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
        angles = torch.arange(positions, dtype=torch.float32)[:, None] * inverse
        self.cos, self.sin = angles.cos().to(device), angles.sin().to(device)  # [positions, w / 2]

    def at(self, positions: Tensor) -> Rotation:
        """How tokens at `positions` [T] turn, the same in all layers."""
        cos = F.embedding(positions, self.cos)[:, None, None]  # [T, 1, 1, width / 2]
        sin = F.embedding(positions, self.sin)[:, None, None]

        def turn(qkv: Tensor, heads: int) -> Tensor:
            parts = qkv.view(len(qkv), 3, heads, -1)
            first, second = parts[:, :2].float().chunk(2, dim=-1)  # [T, 2, H, width / 2]
            turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
            return torch.cat([turned.to(qkv.dtype), parts[:, 2:]], dim=1).view_as(qkv)

        return turn
