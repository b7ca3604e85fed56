# SPDX-License-Identifier: Apache-2.0
"""The engine in this process, beside the machine's own rate and beside sentence-transformers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from arrowhead_engine import linear
from arrowhead_engine.compute import choose
from arrowhead_engine.encoder import Encoder
from arrowhead_engine.errors import UnsupportedModel
from arrowhead_engine.spec import Ids, ModelSpec
from arrowhead_engine.tensors import DTYPES
from arrowhead_engine.tokenizer import Tokenizer
from perf.dtypes import COMPUTED_IN
from perf.stats import Sample, Vectors, interleaved_ms
from perf.texts import Texts, of_tokens

SHAPES = ((1, 16), (1, 128), (8, 16), (32, 16), (32, 128))  # texts x tokens
PEER_SHAPES = ((1, 12), (32, 16))
_MATMUL_SIZE = 2048


@dataclass(frozen=True)
class EngineResult:
    """The encoder alone, token ids to embeddings.

    Attributes:
        ms: of one call.
        gflops: billions of floating-point operations a second, at the median.
        fraction: of the rate that a large matrix product reaches here in the same dtype.
    """

    dtype: str
    texts: int
    tokens: int
    ms: Sample
    gflops: float
    fraction: float


@dataclass(frozen=True)
class PeerResult:
    """Text to embedding in this process; milliseconds of one call.

    Attributes:
        peer_ms: `SentenceTransformer.encode`, float32.
        ours_ms: our tokenizer and encoder, by compute dtype.
    """

    texts: int
    tokens: int
    peer_ms: Sample
    ours_ms: dict[str, Sample]


@dataclass(frozen=True)
class EngineResults:
    """All that was measured in this process.

    Attributes:
        device: where it was computed.
        threads: of ours and of torch.
        engines: which of ours computes, by dtype.
        served_dtype: what `auto` chooses on this machine.
        matmul_gflops: the best rate of a large matrix product, by dtype.
    """

    device: str
    threads: int
    engines: dict[str, str]
    served_dtype: str
    matmul_gflops: dict[str, float]
    engine: list[EngineResult]
    peer: list[PeerResult]


class Engines:
    """One model in every compute dtype, its tokenizer, and the peer, all loaded."""

    def __init__(self, repository: Path, model: str, source: Path) -> None:
        # Late: it takes seconds, and nothing may import it while the server is measured.
        from sentence_transformers import SentenceTransformer
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        compute = choose()
        self.device = torch.device(compute.device)
        self.served_dtype = compute.dtype
        weights = repository / f"{model}_encoder" / "1" / "weights.parquet"
        self.encoders: dict[str, Encoder] = {}
        for dtype in COMPUTED_IN:
            with contextlib.suppress(UnsupportedModel):  # int8 is not to be had everywhere
                self.encoders[dtype] = Encoder.open(weights, device=compute.device, dtype=dtype)
        self.tokenizer = Tokenizer.open(repository / f"{model}_tokenizer" / "1")
        self._peer: Any = SentenceTransformer(
            str(source), device=str(self.device), local_files_only=True
        )
        self._peer.float()

    def embed(self, texts: Sequence[str], dtype: str) -> Vectors:
        """Our vectors, float32 [N, D], computed in `dtype`."""
        ids, _ = self.tokenizer.encode(texts)
        return self.encoders[dtype].embed([np.array(row, np.int32) for row in ids])

    def reference(self, texts: Sequence[str]) -> Vectors:
        """sentence-transformers' vectors, computed in float32."""
        vectors: Vectors = self._peer.encode(list(texts), show_progress_bar=False)
        return vectors

    def measure(self, *, rounds: int, slice_ms: float, limit_s: float) -> EngineResults:
        """Times engine and peer in turns (see `interleaved_ms`), and the machine's own rate."""
        calls: dict[str, Callable[[], object]] = {}
        for dtype in self.encoders:
            for make, product in matmuls(dtype, self.device).items():
                calls[f"matmul {dtype} {make}"] = product
        for texts, tokens in SHAPES:
            ids = _ids(self.encoders["float32"].spec, texts, tokens)
            for dtype, encoder in self.encoders.items():
                calls[f"{dtype} {texts}x{tokens}"] = partial(encoder.embed, ids)
        for count, tokens in PEER_SHAPES:
            source, new = Texts(seed=count), of_tokens(tokens)
            own = [new(source) for _ in range(count)]
            calls[f"peer {count}x{tokens}"] = partial(self.reference, own)
            for dtype in self.encoders:
                calls[f"text {dtype} {count}x{tokens}"] = partial(self.embed, own, dtype)
        taken = interleaved_ms(calls, rounds=rounds, slice_ms=slice_ms, limit_s=limit_s)
        ms = {name: Sample.of(values) for name, values in taken.items()}
        rates = {
            dtype: matmul_gflops(
                min(one.low for name, one in ms.items() if name.startswith(f"matmul {dtype} "))
            )
            for dtype in self.encoders
        }
        return EngineResults(
            device=str(self.device),
            threads=torch.get_num_threads(),
            engines={dtype: encoder.compute.engine for dtype, encoder in self.encoders.items()},
            served_dtype=self.served_dtype,
            matmul_gflops=rates,
            engine=[
                self._result(dtype, texts, tokens, ms[f"{dtype} {texts}x{tokens}"], rates[dtype])
                for dtype in self.encoders
                for texts, tokens in SHAPES
            ],
            peer=[
                PeerResult(
                    texts,
                    tokens,
                    ms[f"peer {texts}x{tokens}"],
                    {dtype: ms[f"text {dtype} {texts}x{tokens}"] for dtype in self.encoders},
                )
                for texts, tokens in PEER_SHAPES
            ],
        )

    def _result(self, dtype: str, texts: int, tokens: int, ms: Sample, rate: float) -> EngineResult:
        operations = texts * flop_per_text(self.encoders[dtype].spec, tokens)
        gflops = operations / ms.median / 1e6
        return EngineResult(dtype, texts, tokens, ms, gflops, gflops / rate)


def flop_per_text(spec: ModelSpec, tokens: int) -> int:
    """Floating-point operations of the matrix products for one text; a multiply-add is two."""
    width, inner = spec.config["hidden_size"], spec.config["intermediate_size"]
    linears = 4 * width * width + 2 * width * inner  # query, key, value, output; up, down
    attention = 2 * tokens * width  # scores, and the sum they weigh
    return int(2 * tokens * (linears + attention) * spec.config["num_hidden_layers"])


def matmuls(
    name: str, device: torch.device, n: int = _MATMUL_SIZE
) -> dict[str, Callable[[], object]]:
    """A matrix product [n, n] x [n, n] by torch's ways in that dtype, by the way's name."""
    if name == "int8":  # what TorchInductor emits: uint8 by int8, by oneDNN
        ops = torch.ops.onednn
        left = torch.randint(0, 255, (n, n), dtype=torch.uint8)
        right = ops.qlinear_prepack(torch.randint(-127, 127, (n, n), dtype=torch.int8), [n, n])
        scales, zeros = torch.full((n,), 0.01), torch.zeros(n, dtype=torch.int64)
        quantized = partial(
            ops.qlinear_pointwise, left, 0.01, 128, right, scales, zeros, torch.zeros(n), 1.0, 0,
            torch.float32, "none", [], "",
        )  # fmt: skip
        return {"onednn": quantized}
    dtype = DTYPES[name]
    x = torch.randn(n, n, device=device).to(dtype)
    weight, bias = torch.randn(n, n, device=device), torch.zeros(n, device=device)
    layers = {
        "packed": linear.make(weight, bias, dtype),
        "plain": linear.PlainLinear(weight.to(dtype), bias.to(dtype)),
    }

    def product(layer: linear.Linear) -> None:
        with torch.inference_mode():
            layer(x)
            if device.type == "cuda":
                torch.cuda.synchronize(device)

    return {name: partial(product, layer) for name, layer in layers.items()}


def matmul_gflops(ms: float, n: int = _MATMUL_SIZE) -> float:
    """GFLOP/s of one of the `matmuls` that took so many milliseconds."""
    return 2 * n**3 / ms / 1e6


def _ids(spec: ModelSpec, texts: int, tokens: int) -> list[Ids]:
    """Random ids, the same ones in every run."""
    random = np.random.default_rng(texts * tokens)
    size = spec.config["vocab_size"]
    return [random.integers(0, size, tokens).astype(np.int32) for _ in range(texts)]
