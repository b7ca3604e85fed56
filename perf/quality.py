# SPDX-License-Identifier: Apache-2.0
"""How near the vectors are to sentence-transformers' float32 ones, and how well they rank."""

from __future__ import annotations

from dataclasses import dataclass

from arrowhead_client.measures import cosines
from perf.stats import Vectors


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
