# SPDX-License-Identifier: Apache-2.0
"""The weight file beside the checkpoint it was made from: size, and time to load."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
from safetensors.torch import load_file

from arrowhead_engine.weightfile import WeightFile
from perf.stats import Sample, elapsed_ms, interleaved_ms


@dataclass(frozen=True)
class WeightResult:
    """Sizes in bytes, times in milliseconds; the files are in the page cache.

    Attributes:
        stored_as: the number formats in the weight file.
        first_open_ms: the very first `open`, libraries' own preparations included.
        open_ms: `WeightFile.open`: mapped and checked, every tensor can be used.
        verify_ms: `WeightFile.verify`: every byte read and its checksum compared.
        read_table_ms: `pyarrow.parquet.read_table` of the same file, which copies.
        safetensors_ms: `safetensors.torch.load_file` of the source checkpoint, mapped likewise.
    """

    parquet_bytes: int
    safetensors_bytes: int
    tensors: int
    stored_as: tuple[str, ...]
    first_open_ms: float
    open_ms: Sample
    verify_ms: Sample
    read_table_ms: Sample
    safetensors_ms: Sample

    @property
    def smaller_percent(self) -> float:
        """How much smaller the weight file is than the checkpoint, in percent."""
        return 100 * (1 - self.parquet_bytes / self.safetensors_bytes)


def measure(parquet: Path, checkpoint: Path, *, rounds: int) -> WeightResult:
    """Times each way of loading, in turns."""
    first = elapsed_ms(lambda: WeightFile.open(parquet).close())
    with WeightFile.open(parquet) as weights:
        taken = interleaved_ms(
            {
                "open": lambda: WeightFile.open(parquet).close(),
                "verify": weights.verify,
                "read_table": lambda: pq.read_table(parquet),
                "safetensors": lambda: load_file(checkpoint),
            },
            rounds=rounds,
        )
        return WeightResult(
            parquet_bytes=parquet.stat().st_size,
            safetensors_bytes=checkpoint.stat().st_size,
            tensors=len(weights.tensors),
            stored_as=tuple(sorted({tensor.dtype for tensor in weights.tensors.values()})),
            first_open_ms=first,
            open_ms=Sample.of(taken["open"]),
            verify_ms=Sample.of(taken["verify"]),
            read_table_ms=Sample.of(taken["read_table"]),
            safetensors_ms=Sample.of(taken["safetensors"]),
        )
