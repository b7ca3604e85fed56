# SPDX-License-Identifier: Apache-2.0
"""A checkpoint's tensors, one at a time, under the engine's names and in the storage dtype."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from arrowhead_conversion.errors import BadWeights, SourceNotFound
from arrowhead_engine.bert import BertConfig, shapes
from arrowhead_engine.encoder import tensor_faults
from arrowhead_engine.spec import ModelSpec
from arrowhead_engine.weightfile import Tensor

# Checkpoint name -> engine name. A prefix that some checkpoints carry, and what is left out on
# purpose: the pooler is no part of a sentence embedding, position_ids are 0, 1, 2, ...
PREFIX = "bert."
DROPPED = ("pooler.dense.weight", "pooler.dense.bias", "embeddings.position_ids")


def tensors(folder: Path, spec: ModelSpec) -> Iterator[Tensor]:
    """Every tensor the network needs, as float16, in the engine's order.

    One tensor is in memory at a time.

    Raises:
        SourceNotFound: no safetensors file in `folder`.
        BadWeights: all that is missing, unexpected or of a wrong shape, at once; or a value that
            is not finite, or too large for float16.
    """
    path = folder / "model.safetensors"
    if not path.is_file():
        raise SourceNotFound(f"{path}: missing; only safetensors are read, nothing is unpickled")
    try:
        with safe_open(str(path), framework="pt") as checkpoint:
            names = {_engine_name(name): name for name in checkpoint.keys()}  # noqa: SIM118
            wanted = shapes(BertConfig.from_dict(spec.config))
            met = {
                ours: tuple(checkpoint.get_slice(theirs).get_shape())
                for ours, theirs in names.items()
                if ours not in DROPPED
            }
            if faults := tensor_faults(met, wanted):
                raise BadWeights(f"{path}: {faults}")
            for name, shape in wanted.items():
                data = _float16(path, name, checkpoint.get_tensor(names[name]))
                yield Tensor(name, "float16", shape, data)
    except SafetensorError as error:
        raise BadWeights(f"{path}: cannot be read ({error}); is the download complete?") from error


def _engine_name(name: str) -> str:
    return name.removeprefix(PREFIX)


def _float16(path: Path, name: str, tensor: torch.Tensor) -> memoryview:
    if not torch.isfinite(tensor).all():
        raise BadWeights(f"{path}: {name} holds NaN or infinity")
    half = tensor.to(torch.float16).contiguous()
    if not torch.isfinite(half).all():
        most = float(tensor.abs().max())
        raise BadWeights(f"{path}: {name} reaches {most:g}, beyond float16's 65504")
    return half.flatten().view(torch.uint8).numpy().data
