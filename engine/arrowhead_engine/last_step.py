# SPDX-License-Identifier: Apache-2.0
"""`LastStep`: a text that is asked again while it is being computed is not computed twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from arrowhead_engine.spec import Ids

Floats = npt.NDArray[np.float32]


class Made(NamedTuple):
    """How a step's vectors were come by.

    Attributes:
        lengths: tokens of each text that was computed.
        remembered: texts of the step before.
        equal: texts equal to another of this step that was computed.
    """

    lengths: list[int]
    remembered: int
    equal: int


class LastStep:
    """`Encoder.embed` that remembers the vectors of the step before, and of no other.

    Triton looks into its response cache when a request comes in. One that comes while its text is
    still being computed finds nothing there, and is in the next step.

    Args:
        embed: ids of texts -> their embeddings, float32 [B, D].

    Attributes:
        made: how the vectors of the last call were come by.
    """

    def __init__(self, embed: Callable[[Sequence[Ids]], Floats]) -> None:
        self._embed = embed
        self._vectors: dict[bytes, Floats] = {}
        self.made = Made([], 0, 0)

    def __call__(self, ids: Sequence[Ids]) -> Floats:
        """The embeddings, float32 [B, D], in memory of the caller's own."""
        texts = [row.tobytes() for row in ids]
        new = {text: row for text, row in zip(texts, ids, strict=True) if text not in self._vectors}
        computed = self._embed(list(new.values()))
        remembered = sum(text in self._vectors for text in texts)
        # Lengths, not the rows: those are the caller's.
        lengths = [len(row) for row in new.values()]
        self.made = Made(lengths, remembered, len(texts) - remembered - len(new))
        if not texts:
            return computed
        known = self._vectors | dict(zip(new, computed, strict=True))
        vectors: Floats = np.stack([known[text] for text in texts])
        self._vectors = dict(zip(texts, vectors, strict=True))
        return vectors.copy()
