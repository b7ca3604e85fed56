# SPDX-License-Identifier: Apache-2.0
"""How near the vectors are to sentence-transformers' float32 ones, and how well they rank."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

from perf.stats import Vectors, cosines, spearman


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


@dataclass(frozen=True)
class StsPairs:
    """Sentence pairs and how alike people found them."""

    left: list[str]
    right: list[str]
    scores: list[float]

    @classmethod
    def read(cls, file: Path) -> StsPairs:
        """Reads a CSV of `sentence1,sentence2,score`, with or without that line on top.

        Raises:
            ValueError: a line has other than three fields, or a score that is no number.
        """
        with file.open(encoding="utf-8", newline="") as lines:
            rows = [row for row in csv.reader(lines) if row]
        if rows and rows[0][-1].strip().lower() == "score":
            del rows[0]
        if not rows or any(len(row) != 3 for row in rows):
            raise ValueError(f"{file}: wanted lines of sentence1,sentence2,score")
        return cls([r[0] for r in rows], [r[1] for r in rows], [float(r[2]) for r in rows])

    def percent(self, left: Vectors, right: Vectors) -> float:
        """Spearman x 100 of the vectors' cosines with the scores."""
        return 100 * spearman(cosines(left, right).tolist(), self.scores)
