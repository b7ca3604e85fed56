# SPDX-License-Identifier: Apache-2.0
"""How near the vectors are to sentence-transformers' float32 ones, and how well they rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from arrowhead_client.measures import cosines
from arrowhead_engine.encoder import Encoder
from arrowhead_engine.tokenizer import Tokenizer
from perf.server import MODEL
from perf.stats import Vectors


def engine_vectors(repository: Path, version: int, texts: Sequence[str]) -> Vectors:
    """The right vectors [N, D] of a version of MiniLM, by the engine in this process."""
    tokens = Tokenizer.open(repository / f"{MODEL}_tokenizer" / str(version))(texts)
    encoder = Encoder.open(repository / f"{MODEL}_encoder" / str(version) / "weights.parquet")
    vectors: Vectors = encoder.embed(encoder.check(tokens.input_ids, tokens.length))
    return vectors


@dataclass(frozen=True)
class Closeness:
    """Cosines of vectors with the reference's, text by text."""

    name: str
    worst: float
    mean: float
    texts: int

    @classmethod
    def of(cls, name: str, vectors: Vectors, reference: Vectors) -> Closeness:
        """Compares two [N, D]."""
        found = cosines(vectors, reference)
        return cls(name, float(found.min()), float(found.mean()), len(found))


@dataclass(frozen=True)
class StsResult:
    """Spearman's correlation, in percent, of cosines with people's scores of sentence pairs."""

    pairs: int
    served: float
    reference: float
