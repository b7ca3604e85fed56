# SPDX-License-Identifier: Apache-2.0
"""A checkpoint's tensors, one at a time, under the engine's names and in the storage dtype."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from arrowhead_conversion.errors import BadWeights, SourceNotFound
from arrowhead_engine.architectures import architecture
from arrowhead_engine.encoder import tensor_faults
from arrowhead_engine.spec import ModelSpec
from arrowhead_engine.weightfile import Tensor


def tensors(folder: Path, spec: ModelSpec) -> Iterator[Tensor]:
    """Every tensor the network needs, as float16, in the engine's order.

    One tensor is in memory at a time. The checkpoint is one safetensors file, or several with an
    index.

    Raises:
        SourceNotFound: no safetensors in `folder`, or not all that its index names.
        BadWeights: all that is missing, unexpected or of a wrong shape, at once; or a value that
            is not finite, or too large for float16.
    """
    kind = architecture(spec.architecture)
    wanted = kind.shapes(kind.config(spec.config))
    try:
        with ExitStack() as stack:
            # Engine name -> the open file it is in, and its name there.
            places: dict[str, tuple[Any, str]] = {}
            for path in _files(folder):
                file = stack.enter_context(safe_open(str(path), framework="pt"))
                for name in file.keys():  # noqa: SIM118  not a mapping
                    places[name.removeprefix(kind.prefix)] = file, name
            met = {
                name: tuple(file.get_slice(theirs).get_shape())
                for name, (file, theirs) in places.items()
                if not name.startswith(kind.dropped)
            }
            if faults := tensor_faults(met, wanted):
                raise BadWeights(f"{folder}: {faults}")
            for name, shape in wanted.items():
                file, theirs = places[name]
                data = _float16(folder, name, file.get_tensor(theirs))
                yield Tensor(name, "float16", shape, data)
    except SafetensorError as error:
        raise BadWeights(
            f"{folder}: cannot be read ({error}); is the download complete?"
        ) from error


def _files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        files = [folder / "model.safetensors"]
    else:
        try:
            shards = set(json.loads(index.read_bytes())["weight_map"].values())
            files = sorted(folder / Path(str(shard)).name for shard in shards)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise BadWeights(f"{index}: not an index of shards ({error})") from error
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise SourceNotFound(
            f"{folder}: {', '.join(missing)} missing; only safetensors are read, "
            "nothing is unpickled"
        )
    return files


def _float16(path: Path, name: str, tensor: torch.Tensor) -> memoryview:
    if not torch.isfinite(tensor).all():
        raise BadWeights(f"{path}: {name} holds NaN or infinity")
    half = tensor.to(torch.float16).contiguous()
    if not torch.isfinite(half).all():
        most = float(tensor.abs().max())
        raise BadWeights(f"{path}: {name} reaches {most:g}, beyond float16's 65504")
    return half.flatten().view(torch.uint8).numpy().data
