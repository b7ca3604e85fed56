# SPDX-License-Identifier: Apache-2.0
"""Texts -> padded ids, for engines that compute whatever is in the rectangle."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from perf.peers.batching import Vectors

Ids = npt.NDArray[np.int64]
Run = Callable[[Ids, Ids], Vectors]  # input_ids, attention_mask [B, S] -> vectors [B, D]
_MOST_PADDING = 0.25  # of the tokens computed


class PaddedEncoder:
    """Tokenizes, pads texts of like length together, and puts the rows back in order."""

    def __init__(self, folder: Path, run: Run) -> None:
        limit = json.loads((folder / "sentence_bert_config.json").read_text())["max_seq_length"]
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(limit)
        self._run = run

    def encode(self, texts: list[str]) -> Vectors:
        """The texts' vectors [N, D]."""
        ids = [encoding.ids for encoding in self._tokenizer.encode_batch(texts)]
        rows: list[Vectors | None] = [None] * len(ids)
        for group in groups([len(row) for row in ids]):
            width = max(len(ids[i]) for i in group)
            input_ids = np.zeros((len(group), width), np.int64)
            mask = np.zeros_like(input_ids)
            for row, i in enumerate(group):
                input_ids[row, : len(ids[i])] = ids[i]
                mask[row, : len(ids[i])] = 1
            for i, vector in zip(group, self._run(input_ids, mask), strict=True):
                rows[i] = vector
        return np.stack([row for row in rows if row is not None])


def groups(lengths: Sequence[int], most_padding: float = _MOST_PADDING) -> list[list[int]]:
    """Indices of texts to be padded together: sorted by length, cut where padding would pass."""
    made: list[list[int]] = []
    real = 0
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        real += lengths[i]
        computed = lengths[i] * (len(made[-1]) + 1) if made else 0
        if made and computed - real <= most_padding * computed:
            made[-1].append(i)
        else:
            made.append([i])
            real = lengths[i]
    return made
