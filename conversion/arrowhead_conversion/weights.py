# SPDX-License-Identifier: Apache-2.0
"""A checkpoint's tensors, one at a time, under the engine's names and in the storage dtype.

Read are safetensors, one file or shards, and PyTorch's `.bin` files through `weights_only`, which
unpickles nothing but tensors.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from arrowhead_conversion.errors import BadWeights, SourceNotFound
from arrowhead_conversion.pipeline import Described
from arrowhead_engine.architectures import Architecture, Config, architecture
from arrowhead_engine.encoder import tensor_faults
from arrowhead_engine.general import GeneralConfig
from arrowhead_engine.pooling import Heads
from arrowhead_engine.sizes import Shapes
from arrowhead_engine.tensors import DTYPES
from arrowhead_engine.weightfile import Tensor

Storage = Literal["float16", "bfloat16", "float32", "int8"]

SAFETENSORS, PICKLED = "model.safetensors", "pytorch_model.bin"


class Place(NamedTuple):
    """Where a tensor is: its shape, and how to read it."""

    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]


def tensors(model: Described, storage: Storage = "float16") -> Iterator[Tensor]:
    """Every tensor the model needs, as stored, in the engine's order; one in memory at a time.

    With "int8", matrices become int8 with a scale for each row (output channel, or word), which
    is the row's largest magnitude over 127; what is no matrix stays float32.

    Raises:
        SourceNotFound: no checkpoint, or not all that its index names.
        BadWeights: all that is missing, unexpected or of a wrong shape, at once; or a value that
            is not finite, or too large for the storage dtype.
    """
    spec = model.spec
    kind = architecture(spec.architecture)
    config: Config = kind.config(spec.config)
    network = kind.shapes(config)
    heads = Heads.after(spec.pooling, spec.heads, config.width).shapes()
    wanted = {**network, **heads}
    try:
        with ExitStack() as stack:
            places = {
                name: place
                for name, place in _renamed(model.network, kind, config, network, stack)
                if name in network or not name.startswith(kind.dropped)
            }
            if isinstance(config, GeneralConfig) and _faults(places, network):
                # In memory whole, for once: transformers cuts and renames what it read.
                loaded = config.load(str(model.network))
                places = {name: _place(tensor) for name, tensor in loaded.items()}
            for i, folder in enumerate(model.heads):
                for theirs, place in _checkpoint(folder, stack):
                    places[f"dense.{i}.{theirs}"] = place
            if faults := _faults(places, wanted):
                raise BadWeights(f"{model.folder}: {faults}")
            for name, shape in wanted.items():
                tensor = places[name].read()
                try:
                    yield _stored(name, shape, tensor, storage)
                except BadWeights as error:
                    raise BadWeights(f"{model.folder}: {error}") from error
    except SafetensorError as error:
        raise BadWeights(
            f"{model.folder}: cannot be read ({error}); is the download complete?"
        ) from error


def _renamed(
    folder: Path, kind: Architecture, config: Config, network: Shapes, stack: ExitStack
) -> Iterator[tuple[str, Place]]:
    """The checkpoint of a network under the engine's names, where those can be told."""
    prefix = config.prefix if isinstance(config, GeneralConfig) else kind.prefix
    for theirs, place in _checkpoint(folder, stack):
        yield (theirs if theirs in network else theirs.removeprefix(prefix)), place


def _faults(places: dict[str, Place], wanted: Shapes) -> str:
    return tensor_faults({name: place.shape for name, place in places.items()}, wanted)


def _place(tensor: torch.Tensor) -> Place:
    return Place(tuple(tensor.shape), tensor.detach)


def _checkpoint(folder: Path, stack: ExitStack) -> Iterator[tuple[str, Place]]:
    """Every tensor of the checkpoint in `folder`: its name, and where it is."""
    for path in _files(folder):
        if path.suffix == ".safetensors":
            file = stack.enter_context(safe_open(str(path), framework="pt"))
            for name in file.keys():  # noqa: SIM118  not a mapping
                shape = tuple(file.get_slice(name).get_shape())
                yield name, Place(shape, partial(file.get_tensor, name))
        else:
            for name, tensor in _unpickled(path).items():
                yield name, _place(tensor)


def _files(folder: Path) -> list[Path]:
    """The checkpoint's files: safetensors before `.bin`, shards by their index."""
    for single in (SAFETENSORS, PICKLED):
        index = folder / f"{single}.index.json"
        if index.is_file():
            return _shards(index)
        if (folder / single).is_file():
            return [folder / single]
    raise SourceNotFound(
        f"{folder}: has neither {SAFETENSORS} nor {PICKLED}, nor an index of shards; is the "
        "download complete?"
    )


def _shards(index: Path) -> list[Path]:
    try:
        names = set(json.loads(index.read_bytes())["weight_map"].values())
        files = sorted(index.parent / Path(str(name)).name for name in names)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BadWeights(f"{index}: not an index of shards ({error})") from error
    if missing := [file.name for file in files if not file.is_file()]:
        raise SourceNotFound(f"{index.parent}: {', '.join(missing)} missing; download it again")
    return files


def _unpickled(path: Path) -> dict[str, torch.Tensor]:
    """The tensors in a `.bin` file, and nothing else: no code that it names is ever run."""
    try:
        try:
            raw = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # written by PyTorch before 1.6, whose format cannot be mapped
            raw = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, KeyError) as error:
        # Not in torch's words, which advise to run the file.
        raise BadWeights(
            f"{path}: cannot be read as tensors alone: it is damaged, or holds objects whose code "
            "would have to run; convert it to safetensors where you trust it"
        ) from error
    if not isinstance(raw, dict) or not all(isinstance(t, torch.Tensor) for t in raw.values()):
        raise BadWeights(f"{path}: does not hold tensors by name")
    return raw


def _stored(name: str, shape: tuple[int, ...], tensor: torch.Tensor, storage: Storage) -> Tensor:
    if not tensor.is_floating_point():
        raise BadWeights(f"{name} holds {tensor.dtype}; wanted floating-point numbers")
    if not torch.isfinite(tensor).all():
        raise BadWeights(f"{name} holds NaN or infinity")
    if storage == "int8" and tensor.dim() == 2:
        return _quantised(name, shape, tensor.float())
    dtype = "float32" if storage == "int8" else storage
    narrow = tensor.to(DTYPES[dtype]).contiguous()
    if not torch.isfinite(narrow).all():
        most = float(tensor.abs().max())
        raise BadWeights(
            f"{name} reaches {most:g}, beyond {dtype}'s {torch.finfo(narrow.dtype).max:g}; store "
            "it as bfloat16 or float32 (--dtype)"
        )
    return Tensor(name, dtype, shape, _bytes(narrow))


def _quantised(name: str, shape: tuple[int, ...], tensor: torch.Tensor) -> Tensor:
    scales = tensor.abs().amax(1) / 127
    # A row of zeros has scale 0, and any finite quotient will do.
    quotients = tensor / torch.where(scales > 0, scales, 1.0)[:, None]
    data = quotients.round().clamp(-127, 127).to(torch.int8)
    return Tensor(name, "int8", shape, _bytes(data), scales.numpy())


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data
