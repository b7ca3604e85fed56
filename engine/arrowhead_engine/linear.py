# SPDX-License-Identifier: Apache-2.0
"""A linear layer, `y = x Wᵀ + b`, in two makes with one face.

`PackedLinear` holds its weight in oneDNN's blocked layout and lets oneDNN add the bias, the GELU or
the residual while the result is still in registers. `PlainLinear` uses the weight as it lies.
The network does not know which it has; `make` chooses once, at load.

The residual is float32 in either: rounding it to bfloat16 twice a layer costs MiniLM's worst cosine
against float32 more than all the products do (0.99988 instead of 0.99992).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor


class Linear(Protocol):
    """`x` [T, in] -> [T, out]; `gelu` is BERT's exact one (erf), not the tanh approximation."""

    def __call__(self, x: Tensor) -> Tensor:
        """Gives x Wᵀ + b."""

    def gelu(self, x: Tensor) -> Tensor:
        """The GELU of x Wᵀ + b."""

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """Gives residual + x Wᵀ + b, in float32."""


class PlainLinear:
    """The weight as it lies, in the map or on the GPU."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def gelu(self, x: Tensor) -> Tensor:
        return F.gelu(self(x))

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        return residual + self(x)


class PackedLinear:
    """oneDNN's layout and fusions: on AMD 2.3 times MKL's float32 rate, which `F.linear` would get.

    Uses `torch.ops.mkldnn`, which TorchInductor emits for the same purpose; it has no public name.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
        self.bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        return _pointwise(x, self.weight, self.bias, "none", [], "none")

    def gelu(self, x: Tensor) -> Tensor:
        return _pointwise(x, self.weight, self.bias, "gelu", [], "none")

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        if x.dtype == residual.dtype:
            return _pointwise_binary(x, residual, self.weight, self.bias, "add")
        return residual + self(x)


def _has_onednn() -> bool:
    return bool(torch._C._has_mkldnn) and hasattr(torch.ops.mkldnn, "_linear_pointwise")


if _has_onednn():
    # Resolved once: the lookup through torch.ops costs as much as a small product.
    _pointwise: Callable[..., Tensor] = torch.ops.mkldnn._linear_pointwise.default
    _pointwise_binary: Callable[..., Tensor] = torch.ops.mkldnn._linear_pointwise.binary


def make(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Linear:
    """A layer computing in `dtype` where its `weight` [out, in] and `bias` [out], if any, lie."""
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    packable = weight.device.type == "cpu" and dtype in (torch.float32, torch.bfloat16)
    return PackedLinear(weight, bias) if packable and _has_onednn() else PlainLinear(weight, bias)
