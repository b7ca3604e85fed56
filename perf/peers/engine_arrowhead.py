# SPDX-License-Identifier: Apache-2.0
"""Our own tokenizer and encoder, without a server. Variants: our compute dtypes."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from arrowhead_engine.encoder import Encoder
from arrowhead_engine.tokenizer import Tokenizer
from perf.peers.batching import Vectors
from perf.server import MODEL


class _ArrowheadEncoder:
    def __init__(self, variant: str, repository: Path) -> None:
        weights = repository / f"{MODEL}_encoder" / "1" / "weights.parquet"
        self._encoder = Encoder.open(weights, device="cpu", dtype=variant)
        self._tokenizer = Tokenizer.open(repository / f"{MODEL}_tokenizer" / "1")

    def encode(self, texts: list[str]) -> Vectors:
        ids, _ = self._tokenizer.encode(texts)
        return self._encoder.embed([np.array(row, np.int32) for row in ids])


def open_encoder(variant: str, folder: Path) -> _ArrowheadEncoder:
    """The model of the repository `folder`, computed in `variant`."""
    return _ArrowheadEncoder(variant, folder)
