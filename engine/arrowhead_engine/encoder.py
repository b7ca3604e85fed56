# SPDX-License-Identifier: Apache-2.0
"""`Encoder`: a weight file, opened and proved; token ids in, embeddings out."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from arrowhead_engine import native
from arrowhead_engine.architectures import Architecture, Config, architecture
from arrowhead_engine.compute import choose
from arrowhead_engine.errors import (
    CertificateMismatch,
    InvalidInput,
    UnsupportedModel,
    WeightsMismatch,
)
from arrowhead_engine.pooling import Heads, normalize, poolings
from arrowhead_engine.spec import Certificate, Ids, ModelSpec, model_sha256
from arrowhead_engine.weightfile import WeightFile

# Lowest cosine at load between a certified vector and ours, by compute dtype. Right engines reach
# 0.999999 (float32), 0.99999 (float16), 0.99993 (bfloat16) and 0.998 (int8); a wrong one falls far
# below.
PROBE_COSINE = {"float32": 0.99999, "float16": 0.9999, "bfloat16": 0.9998, "int8": 0.98}
PROBE_LENGTH = 0.01  # how far from 1 the ratio of their lengths may be


class Engine(Protocol):
    """What computes: ids to pooled vectors."""

    def __call__(self, ids: Sequence[Ids], skips: Sequence[int] | None) -> npt.NDArray[np.float32]:
        """The pooled vectors, float32 [B, poolings x D]; `skips` tokens of each do not count."""


class Encoder:
    """A model ready to embed. Not for several threads at once: the engine's own do the work.

    Attributes:
        spec: what the model is.
        compute: the engine, device and dtype in use.
    """

    def __init__(
        self,
        weights: WeightFile,
        spec: ModelSpec,
        *,
        device: str = "auto",
        dtype: str = "auto",
        engine: str = "auto",
        shared: str | os.PathLike[str] | None = None,
        threads: int | None = None,
    ) -> None:
        kind = architecture(spec.architecture)
        modes = poolings(spec.pooling)
        config = _sizes(kind, spec.config, len(weights.tensors))
        if spec.max_seq_length > config.most_tokens:
            raise UnsupportedModel(
                f"max_seq_length {spec.max_seq_length}; the network has positions for "
                f"{config.most_tokens} tokens"
            )
        heads = Heads.after(spec.pooling, spec.heads, config.width)
        if spec.dimension != heads.width:
            raise UnsupportedModel(f"dimension {spec.dimension}; the model's is {heads.width}")
        met = {name: tensor.shape for name, tensor in weights.tensors.items()}
        if faults := tensor_faults(met, {**kind.shapes(config), **heads.shapes()}):
            raise WeightsMismatch(f"{weights.path}: {faults}")
        plan = kind.plan(config) if kind.plan else None
        plain = plan is not None and native.knows(plan)
        self.spec = spec
        self.compute = choose(device, dtype, engine, plain=plain)
        self._weights = weights
        self._vocab_size = config.vocab_size
        self._heads = heads.load(weights.float32)
        self._engine: Engine
        if self.compute.engine == "native" and plan is not None:
            self._engine = native.NativeEngine(
                weights,
                plan,
                spec.max_seq_length,
                modes,
                self.compute.dtype,
                shared=None if shared is None else Path(shared),
                threads=threads,
            )
        else:
            from arrowhead_engine.torch_engine import TorchEngine  # a second and 200 MB

            if threads is not None:
                import torch

                torch.set_num_threads(threads)
            self._engine = TorchEngine(weights, kind, config, modes, self.compute)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        device: str = "auto",
        dtype: str = "auto",
        engine: str = "auto",
        shared: str | os.PathLike[str] | None = None,
        threads: int | None = None,
    ) -> Encoder:
        """Maps a weight file and builds its network; `verify` proves it.

        Args:
            path: a weight file (docs/format.md).
            device: "auto", "cpu", "cuda" or "cuda:N" (compute.py).
            dtype: "auto", "float32", "bfloat16", "float16" or "int8".
            engine: "auto", "native" or "torch".
            shared: a folder of the user's own, for processes to share the memory that the native
                engine lays weights out in (panels.py).
            threads: that compute on the CPU; None: as many as the process may keep busy.

        Raises:
            FileNotFoundError: no such file.
            WeightFileError: the file is not sound.
            UnsupportedModel: what the file or the caller asks for is not known, or not here.
            WeightsMismatch: the tensors are not the model's.
        """
        weights = WeightFile.open(path)
        spec = ModelSpec.from_metadata(weights.metadata)
        return cls(
            weights,
            spec,
            device=device,
            dtype=dtype,
            engine=engine,
            shared=shared,
            threads=threads,
        )

    def verify(self) -> None:
        """Proves that the file is as it was written and that this machine computes it right.

        Compares the hash of all weights, and the embeddings of the certificate's probes.

        Raises:
            ChecksumMismatch: a tensor's bytes were changed.
            CertificateMismatch: the weights or an embedding are not the certified ones.
            UnsupportedModel: there is no certificate, or it cannot be understood.
        """
        certificate = Certificate.from_metadata(self._weights.metadata)
        if self._weights.sha256() != certificate.weights_sha256:
            self._weights.verify()  # names the tensor that was damaged, if that is what it is
            raise CertificateMismatch(
                f"{self._weights.path}: not the certified weights; convert the model again"
            )
        if model_sha256(self._weights.metadata) != certificate.model_sha256:
            raise CertificateMismatch(
                f"{self._weights.path}: not the certified pooling and limits; convert it again"
            )
        # Of all that was read, the engine goes on using only the words that texts hold.
        self._weights.release()
        least = PROBE_COSINE[self.compute.dtype]
        if self.compute.dtype in ("bfloat16", "float16"):  # a deep model loses more: twice its loss
            least = min(least, 1 - 2 * (1 - certificate.bfloat16_cosine))
        for probe in certificate.probes:
            if probe.embedding.shape != (self.spec.dimension,):
                raise UnsupportedModel(
                    f"{self._weights.path}: its certificate is for another width"
                )
            ids = np.array([probe.input_ids], np.int32)
            try:
                vector = self.embed(self.check(ids, np.array([ids.size], np.int32)))[0]
            except InvalidInput as error:
                raise UnsupportedModel(f"{self._weights.path}: its certificate: {error}") from error
            similar = cosine(probe.embedding, vector)
            longer = float(np.linalg.norm(vector) / np.linalg.norm(probe.embedding))
            if not (similar >= least and abs(longer - 1) <= PROBE_LENGTH):  # NaN fails too
                raise CertificateMismatch(
                    f"{self._weights.path}: a certified text comes out at cosine {similar:.6f} and "
                    f"{longer:.4f} times its length ({self.compute}), wanted {least} and 1; "
                    "convert the model again, or set compute_dtype to float32"
                )

    def check(self, input_ids: npt.NDArray[np.int32], length: npt.NDArray[np.int32]) -> list[Ids]:
        """The real ids of each text as int32, after proof that they can be embedded.

        Args:
            input_ids: int32 [B, S], rows padded at the end.
            length: int32 [B, 1] or [B], real ids in each row.

        Whole numbers of another width are taken as well.

        Raises:
            InvalidInput: says which row, what was met and what was wanted. Nothing was computed.
        """
        for name, array in (("input_ids", input_ids), ("length", length)):
            if array.dtype.kind not in "iu":
                raise InvalidInput(f"{name} is of {array.dtype}; wanted int32")
        if input_ids.ndim != 2:
            raise InvalidInput(f"input_ids has {input_ids.ndim} axes; wanted two, [texts, tokens]")
        width = input_ids.shape[1]
        longest = min(width, self.spec.max_seq_length)
        lengths = length.reshape(-1)
        if len(lengths) != len(input_ids):
            raise InvalidInput(f"{len(lengths)} lengths for {len(input_ids)} rows of input_ids")
        if bad := np.flatnonzero((lengths < 1) | (lengths > longest)).tolist():
            raise InvalidInput(
                f"row {bad[0]}: length {lengths[bad[0]]}; wanted 1 to {longest} (input_ids has "
                f"{width} columns, the model takes {self.spec.max_seq_length} tokens)"
            )
        rows = [row[:n] for row, n in zip(input_ids, lengths, strict=True)]
        for i, row in enumerate(rows):
            if int(row.min()) < 0 or int(row.max()) >= self._vocab_size:
                raise InvalidInput(
                    f"row {i}: ids from {row.min()} to {row.max()}; wanted 0 to "
                    f"{self._vocab_size - 1}"
                )
        # Views, mostly. Of wider ids the kernels would read other numbers than these.
        return [row.astype(np.int32, copy=False) for row in rows]

    def embed(self, ids: Sequence[Ids]) -> npt.NDArray[np.float32]:
        """The embeddings, float32 [B, D], of texts given as int32 ids without padding.

        What the model's own pipeline gives for each text alone: neither the neighbours nor the
        order matter beyond rounding, in the native engine not at all. The ids must have passed
        `check`.
        """
        if not len(ids):
            return np.empty((0, self.spec.dimension), np.float32)
        # Equal texts of a batch are computed once.
        places: dict[bytes, int] = {}
        place = [places.setdefault(row.tobytes(), len(places)) for row in ids]
        if len(places) < len(ids):
            ids = [np.frombuffer(row, np.int32) for row in places]
        skips = None
        if self.spec.excluded_prompts:
            skips = [self._prompt_tokens(row) for row in ids]
        vectors = self._heads(self._engine(ids, skips))
        if self.spec.normalize:
            vectors = normalize(vectors)
        return vectors[place] if len(places) < len(place) else vectors

    def _prompt_tokens(self, row: Ids) -> int:
        """How many tokens of a text are those of a prompt that does not count; never all."""
        for prompt in self.spec.excluded_prompts:
            known = prompt["ids"]
            if row[: len(known)].tolist() == known:
                return min(int(prompt["tokens"]), len(row) - 1)
        return 0


# How configurations call the number of a network's layers.
_LAYERS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")


def _sizes(kind: Architecture, raw: Mapping[str, Any], tensors: int) -> Config:
    """The network's sizes.

    Raises:
        UnsupportedModel: they are none, or tell of more layers than the file has tensors: naming
            those that are missing would take for ever.
    """
    for name in _LAYERS:
        value = raw.get(name)
        if isinstance(value, int) and value > tensors:
            raise UnsupportedModel(f"{name} is {value}; the file has {tensors} tensors in all")
    try:
        config: Config = kind.config(dict(raw))
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UnsupportedModel(f"config is none of a network's sizes: {error}") from error
    return config


def cosine(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]) -> float:
    """The cosine of two vectors [D], computed in float64."""
    x, y = a.astype(np.float64), b.astype(np.float64)
    return float(x @ y / (np.linalg.norm(x) * np.linalg.norm(y)))


def tensor_faults(met: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> str:
    """All that is wrong with a checkpoint's tensors (name -> shape), at once; or nothing."""
    faults = [f"missing {name}" for name in wanted if name not in met]
    faults += [f"unexpected {name}" for name in met if name not in wanted]
    faults += [
        f"{name} is {list(met[name])}, wanted {list(shape)}"
        for name, shape in wanted.items()
        if name in met and met[name] != shape
    ]
    return "; ".join(faults)
