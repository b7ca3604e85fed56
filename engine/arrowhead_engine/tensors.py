# SPDX-License-Identifier: Apache-2.0
"""A weight file's tensors as torch tensors: views of the map, or of its one copy on a device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from arrowhead_engine.weightfile import TensorInfo, WeightFile

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STORED = {**DTYPES, "int8": torch.int8}


@dataclass(frozen=True)
class Rows:
    """A table [N, D] that is looked up by row and stays as it is stored.

    On a CPU that is the map, of which only the rows that texts touch ever become resident.

    Attributes:
        table: [N, D], float16, bfloat16, float32 or int8.
        scales: float32 [N, 1], what int8 rows are multiplied with; of others None.
    """

    table: Tensor
    scales: Tensor | None

    def __call__(self, places: Tensor) -> Tensor:
        """The rows at `places` [T], float32 [T, D]."""
        rows = F.embedding(places, self.table).float()
        return rows if self.scales is None else rows * F.embedding(places, self.scales)


class Tensors:
    """The tensors of a weight file by name, on a device."""

    def __init__(self, weights: WeightFile, device: torch.device) -> None:
        self._weights = weights
        self._device = device
        self._copy: Tensor | None = None
        if device.type != "cpu" and weights.mapped:
            first, last = weights.span
            self._copy = torch.frombuffer(weights.map()[first:last], dtype=torch.uint8).to(device)

    def __call__(self, name: str) -> Tensor:
        """The tensor of that name; an int8 one as float32, its rows multiplied with their scales.

        Raises:
            KeyError: no tensor of that name.
        """
        stored, scales = self._stored(name), self._scales(name)
        if scales is None:
            return stored
        return stored.float() * scales.view(-1, *[1] * (stored.dim() - 1))

    def rows(self, name: str) -> Rows:
        """The tensor of that name, to be looked up by row."""
        return Rows(self._stored(name), self._scales(name))

    def _stored(self, name: str) -> Tensor:
        if self._copy is not None:
            return view(self._weights, self._copy, name)
        info = self._weights.tensors[name]
        return _whole(self._weights.buffer(name), info).to(self._device)

    def _scales(self, name: str) -> Tensor | None:
        if self._weights.tensors[name].dtype != "int8":
            return None
        return torch.tensor(self._weights.scales(name), device=self._device)[:, None]


def view(weights: WeightFile, copy: Tensor, name: str) -> Tensor:
    """A tensor as a view of `copy`: the bytes of the file's `span`, uint8, anywhere."""
    first, _ = weights.span
    info = weights.tensors[name]
    start = (info.offset or first) - first
    flat = copy[start : start + info.nbytes].view(STORED[info.dtype])
    return flat.reshape(info.shape)


def _whole(buffer: memoryview, info: TensorInfo) -> Tensor:
    if not info.nbytes:  # torch.frombuffer takes no empty buffer
        return torch.empty(info.shape, dtype=STORED[info.dtype])
    return torch.frombuffer(buffer, dtype=STORED[info.dtype]).reshape(info.shape)
