# SPDX-License-Identifier: Apache-2.0
"""sentence-transformers, as its users call it. Variants: float32, bfloat16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from perf.peers.batching import MOST_TEXTS, Vectors
from perf.peers.engines import cores


class _TorchEncoder:
    def __init__(self, variant: str, folder: Path) -> None:
        torch.set_num_threads(cores())
        self._model: Any = SentenceTransformer(
            str(folder),
            device="cpu",
            local_files_only=True,
            model_kwargs={"dtype": getattr(torch, variant)},
        )

    def encode(self, texts: list[str]) -> Vectors:
        # Sorts by length itself; the longest of a call pads the others.
        found = self._model.encode(texts, batch_size=MOST_TEXTS, show_progress_bar=False)
        return np.asarray(found, np.float32)


def open_encoder(variant: str, folder: Path) -> _TorchEncoder:
    """The checkpoint in `folder`, computed in the torch dtype `variant`."""
    return _TorchEncoder(variant, folder)
