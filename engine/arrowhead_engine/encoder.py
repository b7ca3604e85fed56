# SPDX-License-Identifier: Apache-2.0
"""`Encoder`: a weight file, opened and proved; token ids in, embeddings out."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from arrowhead_engine.architectures import Config, architecture
from arrowhead_engine.compute import Compute, choose
from arrowhead_engine.errors import (
    CertificateMismatch,
    InvalidInput,
    UnsupportedModel,
    WeightsMismatch,
)
from arrowhead_engine.packing import Ids, Step, pack
from arrowhead_engine.pooling import Heads, normalize, poolings
from arrowhead_engine.spec import Certificate, ModelSpec, model_sha256
from arrowhead_engine.tensors import Tensors
from arrowhead_engine.weightfile import WeightFile

# Tokens that go through the network at once. More brings no speed on a CPU and costs memory; a GPU
# wants more to be busy.
TOKEN_BUDGET = {"cpu": 4096, "cuda": 65536}

# Lowest cosine at load between a certified float32 vector and ours, by compute dtype. Right engines
# reach 0.999999 (float32), 0.99999 (float16) and 0.99993 (bfloat16); a wrong one falls far below.
PROBE_COSINE = {torch.float32: 0.99999, torch.float16: 0.9999, torch.bfloat16: 0.9998}
PROBE_LENGTH = 0.01  # how far from 1 the ratio of their lengths may be


class Encoder:
    """A model ready to embed. Not for several threads at once: torch's own threads do the work.

    Attributes:
        spec: what the model is.
        compute: the device and dtype in use.
    """

    def __init__(self, weights: WeightFile, spec: ModelSpec, compute: Compute) -> None:
        kind = architecture(spec.architecture)
        self._poolings = poolings(spec.pooling)
        config: Config = kind.config(spec.config)
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
        self.spec = spec
        self.compute = compute
        self._weights = weights
        self._vocab_size = config.vocab_size
        with torch.inference_mode():
            tensors = Tensors(weights, compute.device)
            self._network = kind.network(config, tensors, compute.dtype)
            self._heads = heads.load(tensors)
        self._token_budget = TOKEN_BUDGET[compute.device.type]

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], *, device: str = "auto", dtype: str = "auto"
    ) -> Encoder:
        """Maps a weight file and builds its network; `verify` proves it.

        Args:
            path: a weight file (docs/format.md).
            device: "auto", "cpu", "cuda" or "cuda:N" (compute.py).
            dtype: "auto", "float32", "bfloat16" or "float16".

        Raises:
            FileNotFoundError: no such file.
            WeightFileError: the file is not sound.
            UnsupportedModel: the engine does not know the model, device or dtype.
            WeightsMismatch: the tensors are not the model's.
        """
        weights = WeightFile.open(path)
        return cls(weights, ModelSpec.from_metadata(weights.metadata), choose(device, dtype))

    def verify(self) -> None:
        """Proves that the file is as it was written and that this machine computes it right.

        Compares every tensor's checksum, the hash of all weights, and the embeddings of the
        certificate's probes.

        Raises:
            ChecksumMismatch: a tensor's bytes were changed.
            CertificateMismatch: the weights or an embedding are not the certified ones.
            UnsupportedModel: there is no certificate, or it cannot be understood.
        """
        certificate = Certificate.from_metadata(self._weights.metadata)
        if self._weights.verify() != certificate.weights_sha256:
            raise CertificateMismatch(
                f"{self._weights.path}: not the certified weights; convert the model again"
            )
        if model_sha256(self._weights.metadata) != certificate.model_sha256:
            raise CertificateMismatch(
                f"{self._weights.path}: not the certified pooling and limits; convert it again"
            )
        least = PROBE_COSINE[self.compute.dtype]
        if self.compute.dtype != torch.float32:  # a deep model loses more; allow twice its loss
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
        """The real ids of each text, after proof that they can be embedded.

        Args:
            input_ids: int32 [B, S], rows padded at the end.
            length: int32 [B, 1] or [B], real ids in each row.

        Raises:
            InvalidInput: says which row, what was met and what was wanted. Nothing was computed.
        """
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
        return rows

    def embed(self, ids: Sequence[Ids]) -> npt.NDArray[np.float32]:
        """The embeddings, float32 [B, D], of texts given as int32 ids without padding.

        Exactly what the model's own pipeline gives for each text alone: neither the neighbours nor
        the order matter beyond rounding. The ids must have passed `check`.
        """
        out = np.empty((len(ids), self.spec.dimension), np.float32)
        with torch.inference_mode():
            for step in pack(ids, self.compute.device, self._token_budget):
                vectors = self._heads(self._pool(self._network(step), step, ids))
                if self.spec.normalize:
                    vectors = normalize(vectors)
                out[step.order] = vectors.cpu().numpy()
        return out

    def _pool(self, tokens: Tensor, step: Step, ids: Sequence[Ids]) -> Tensor:
        """Token vectors [T, D] -> one vector a text, [B, D x poolings]."""
        lengths, first = step.lengths, torch.zeros_like(step.lengths)
        if self.spec.excluded_prompts:
            skips = [self._prompt_tokens(ids[i]) for i in step.order]
            first = torch.tensor(skips, device=lengths.device)
            tokens = tokens[step.positions[: step.real] >= first.repeat_interleave(lengths)]
            lengths = lengths - first
        return torch.cat([pool(tokens, lengths, first) for pool in self._poolings], dim=1)

    def _prompt_tokens(self, row: Ids) -> int:
        """How many tokens of a text are those of a prompt that does not count; never all."""
        for prompt in self.spec.excluded_prompts:
            known = prompt["ids"]
            if row[: len(known)].tolist() == known:
                return min(int(prompt["tokens"]), len(row) - 1)
        return 0


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
