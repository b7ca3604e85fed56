# SPDX-License-Identifier: Apache-2.0
"""The native engine: BERT and its kin on a CPU, by the kernels in `kernels/`. Imports no torch.

The word table stays in the map. The weights of linear layers are laid out anew for the processor
(panels.py says where): float16 ones stay float16 for float32 products, being exactly those numbers;
for "int8" they take a byte each.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import threading
import weakref
from collections.abc import Iterator, Sequence
from ctypes import POINTER, Structure, byref, c_float, c_int, c_size_t, c_void_p
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from arrowhead_engine.compute import library, processors
from arrowhead_engine.panels import Panels
from arrowhead_engine.pooling import POOLINGS
from arrowhead_engine.sizes import PostNorm
from arrowhead_engine.spec import Ids
from arrowhead_engine.weightfile import WeightFile

LOGGER = logging.getLogger(__name__)

Floats = npt.NDArray[np.float32]

PANEL = 32  # outputs of a linear layer that are computed together (kernels/tile.hpp)
FORMATS = {"float32": 0, "float16": 1, "bfloat16": 2, "int8": 3}  # kernels/linear.hpp


def knows(plan: PostNorm) -> bool:
    """Whether the kernels can do it: all widths, a head's too, must be multiples of 32."""
    return not (plan.width % PANEL or plan.wide % PANEL or plan.width // plan.heads % PANEL)


class _Norm(Structure):
    _fields_ = [("weight", c_void_p), ("bias", c_void_p)]


class _Layer(Structure):
    _fields_ = [
        ("qkv", c_void_p),
        ("mixed", c_void_p),
        ("up", c_void_p),
        ("down", c_void_p),
        ("attention", _Norm),
        ("output", _Norm),
    ]


class _Plan(Structure):
    _fields_ = [
        ("width", c_int),
        ("heads", c_int),
        ("wide", c_int),
        ("layers", c_int),
        ("words_format", c_int),
        ("most", c_int),
        ("eps", c_float),
        ("words", c_void_p),
        ("word_scales", c_void_p),
        ("positions", c_void_p),
        ("distances", c_void_p),
        ("embeddings", _Norm),
        ("layer", POINTER(_Layer)),
    ]


@cache
def _kernels() -> ctypes.CDLL:
    kernels = ctypes.CDLL(str(library()))
    pointer, number = c_void_p, c_int
    kernels.arrowhead_panels.restype = c_size_t
    kernels.arrowhead_panels.argtypes = [number, number, number]
    kernels.arrowhead_lay_out.restype = number
    kernels.arrowhead_lay_out.argtypes = [
        pointer, number, number, number, pointer, number, pointer,
    ]  # fmt: skip
    kernels.arrowhead_linear.restype = pointer
    kernels.arrowhead_linear.argtypes = [pointer, number, number, number, pointer]
    kernels.arrowhead_network.restype = pointer
    kernels.arrowhead_network.argtypes = [POINTER(_Plan), number]
    kernels.arrowhead_embed.restype = number
    kernels.arrowhead_embed.argtypes = [
        pointer, number, pointer, pointer, pointer, number, pointer, pointer,
    ]  # fmt: skip
    kernels.arrowhead_free_linear.argtypes = [pointer]
    kernels.arrowhead_free_network.argtypes = [pointer]
    return kernels


class _Product(NamedTuple):
    """Linear layers computed as one, their outputs side by side.

    Attributes:
        names: the layers', without ".weight" and ".bias".
        stored: the dtype of their weights; "float32" if they are stored differently.
        format: what the panels hold.
        inputs, outputs: how many.
    """

    names: tuple[str, ...]
    stored: str
    format: str
    inputs: int
    outputs: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """As the kernels want it."""
        return FORMATS[self.format], self.inputs, self.outputs


class NativeEngine:
    """A network and its poolings, in the kernels. Calls of several threads wait for each other."""

    def __init__(
        self,
        weights: WeightFile,
        plan: PostNorm,
        most: int,
        poolings: Sequence[str],
        dtype: str,
        threads: int | None = None,
        shared: Path | None = None,
    ) -> None:
        """Lays the weights out, unless another process did.

        Args:
            weights: the file; its map stays open as long as the engine.
            plan: the network.
            most: tokens of the longest text.
            poolings: names, of `pooling.POOLINGS`.
            dtype: of products: "float32", "bfloat16" or "int8".
            threads: as many as the process may keep busy, unless given.
            shared: the folder in which processes share what was laid out (panels.py).

        Raises:
            MemoryError: there is not enough.
        """
        self._weights = weights
        self._dtype = dtype
        self._kept: list[Any] = []  # what the kernels point to
        self._linears: list[int] = []
        self._width = plan.width
        self._pooling = np.array([POOLINGS.index(name) for name in poolings], np.int32)
        self._one = threading.Lock()  # the kernels have one set of buffers
        # Whatever happens on the way, what was made is given back. Not at the interpreter's end,
        # though, when a daemon thread may still be computing: the system takes it then.
        self._network: list[int] = []
        self._panels: list[Panels] = []
        finalizer = weakref.finalize(self, _free, self._network, self._linears, self._panels)
        finalizer.atexit = False

        first = plan.first_position
        positions = weights.float32(plan.positions)[first : first + most]
        if plan.types is not None:
            # Every text is of token type 0, so that row is added to the positions once and for all.
            positions = positions + weights.float32(plan.types)[0]
        distances = None
        if plan.distances is not None:
            name, table = plan.distances
            distances = self._pointer(table(weights.float32(name), most))
        self._words = weights.tensors[plan.words].shape[0]
        scales = weights.scales(plan.words)
        linears = iter(self._laid_out(plan, shared))
        self._plan = _Plan(
            width=plan.width,
            heads=plan.heads,
            wide=plan.wide,
            layers=plan.layers,
            words_format=FORMATS[weights.tensors[plan.words].dtype],
            most=most,
            eps=plan.eps,
            words=self._pointer(weights.stored(plan.words)),
            word_scales=self._pointer(scales) if len(scales) else None,
            positions=self._pointer(positions),
            distances=distances,
            embeddings=self._norm(plan.norm),
            layer=(_Layer * plan.layers)(
                *(self._layer(plan, i, linears) for i in range(plan.layers))
            ),
        )
        self._network.append(
            _made(_kernels().arrowhead_network(byref(self._plan), threads or processors()))
        )

    def __call__(self, ids: Sequence[Ids], skips: Sequence[int] | None) -> Floats:
        """The pooled vectors, float32 [B, poolings x D]; `skips` tokens of each do not count.

        Raises:
            ValueError: these ids have not passed `Encoder.check`. The kernels look at none: they
                would read what is not theirs.
        """
        flat = np.ascontiguousarray(np.concatenate(ids), np.int32)
        counts = [len(row) for row in ids]
        # Taken for unsigned, negative ids are high ones.
        if (
            min(counts) < 1
            or max(counts) > self._plan.most
            or flat.view(np.uint32).max() >= self._words
        ):
            raise ValueError(
                f"texts of {min(counts)} to {max(counts)} ids from {flat.min(initial=0)} to "
                f"{flat.max(initial=0)}; wanted 1 to {self._plan.most}, below {self._words}"
            )
        lengths = np.array(counts, np.int32)
        skipped = None if skips is None else np.array(skips, np.int32)
        out = np.empty((len(ids), len(self._pooling) * self._width), np.float32)
        with self._one:
            failed = _kernels().arrowhead_embed(
                self._network[0],
                len(ids),
                flat.ctypes.data,
                lengths.ctypes.data,
                None if skipped is None else skipped.ctypes.data,
                len(self._pooling),
                self._pooling.ctypes.data,
                out.ctypes.data,
            )
        if failed:
            raise MemoryError(f"not enough for {len(flat)} tokens in {len(ids)} texts")
        return out

    def _layer(self, plan: PostNorm, number: int, linears: Iterator[int]) -> _Layer:
        at, names = plan.layer.format(number), plan.names
        return _Layer(
            qkv=next(linears),
            mixed=next(linears),
            up=next(linears),
            down=next(linears),
            attention=self._norm(at + names["attention_norm"]),
            output=self._norm(at + names["norm"]),
        )

    def _norm(self, name: str) -> _Norm:
        weight, bias = (self._weights.float32(f"{name}.{part}") for part in ("weight", "bias"))
        return _Norm(self._pointer(weight), self._pointer(bias))

    def _laid_out(self, plan: PostNorm, shared: Path | None) -> list[int]:
        """The linear layers: four of each layer of the network, as `_layer` takes them."""
        products = [
            self._product(*(plan.layer.format(number) + plan.names[name] for name in names))
            for number in range(plan.layers)
            for names in (("query", "key", "value"), ("attention_out",), ("up",), ("down",))
        ]
        sizes = [_kernels().arrowhead_panels(*product.shape) for product in products]

        def lay_out(number: int, address: int) -> None:
            self._lay_out(products[number], address)

        panels = None
        if shared is not None:
            try:
                panels = Panels.shared(shared / self._key(products), sizes, lay_out)
            except OSError as error:
                LOGGER.warning("%s: weights cannot be shared there: %s", shared, error)
        panels = panels or Panels.private(sizes, lay_out)
        self._panels.append(panels)
        for product, address in zip(products, panels.addresses, strict=True):
            biases = [self._weights.float32(f"{name}.bias") for name in product.names]
            bias = self._pointer(np.concatenate(biases))
            made = _kernels().arrowhead_linear(address, *product.shape, bias)
            self._linears.append(_made(made))
        return self._linears

    def _product(self, *names: str) -> _Product:
        infos = [self._weights.tensors[f"{name}.weight"] for name in names]
        dtypes = {info.dtype for info in infos}
        stored = dtypes.pop() if len(dtypes) == 1 else "float32"
        # float16 holds exactly what the file does, and halves what a short text has to read.
        exact = self._dtype == "float32" and stored == "float16"
        format_ = "float16" if exact else self._dtype
        outputs = sum(info.shape[0] for info in infos)
        return _Product(names, stored, format_, infos[0].shape[1], outputs)

    def _lay_out(self, product: _Product, address: int) -> None:
        parts = [f"{name}.weight" for name in product.names]
        same = all(self._weights.tensors[part].dtype == product.stored for part in parts)
        read = self._weights.stored if same else self._weights.float32
        rows = np.concatenate([read(part) for part in parts])
        scales = None
        if product.stored == "int8":
            scales = np.concatenate([self._weights.scales(part) for part in parts])
        failed = _kernels().arrowhead_lay_out(
            address,
            *product.shape,
            rows.ctypes.data,
            FORMATS[product.stored],
            None if scales is None else scales.ctypes.data,
        )
        if failed:
            raise MemoryError("not enough to lay the weights out")

    def _key(self, products: Sequence[_Product]) -> str:
        """Of all that decides over a bit of the panels: kernels, weights, and what is laid out."""
        tensors = [(info.name, info.dtype, info.shape) for info in self._weights.tensors.values()]
        key = hashlib.sha256(library().read_bytes())
        key.update(repr((self._weights.sha256(), tensors, products)).encode())
        return key.hexdigest()

    def _pointer(self, array: npt.NDArray[Any]) -> int:
        array = np.ascontiguousarray(array)
        self._kept.append(array)
        return array.ctypes.data


def _made(address: int | None) -> int:
    if not address:
        raise MemoryError("not enough to lay the weights out")
    return address


def _free(networks: list[int], linears: list[int], panels: list[Panels]) -> None:
    for network in networks:  # its threads first, they use the rest
        _kernels().arrowhead_free_network(network)
    for linear in linears:
        _kernels().arrowhead_free_linear(linear)
    for memory in panels:
        memory.close()
