# SPDX-License-Identifier: Apache-2.0
"""The engines by name. Each is imported only where it is run: each has its own environment."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Protocol, cast

from perf.peers.batching import Vectors

ENGINES = ("torch", "onnxruntime", "openvino", "arrowhead")


class Encoder(Protocol):
    """Texts -> vectors [N, D], float32, of unit length."""

    def encode(self, texts: list[str]) -> Vectors: ...


def open_encoder(engine: str, variant: str, folder: Path) -> Encoder:
    """An engine with the model loaded.

    Args:
        engine: one of `ENGINES`.
        variant: what it computes in; each engine's file says which there are.
        folder: the model, as that engine reads it.
    """
    module = importlib.import_module(f"perf.peers.engine_{engine}")
    return cast(Encoder, module.open_encoder(variant, folder))


def cores() -> int:
    """Processors that this process may use: as many threads compute."""
    return len(os.sched_getaffinity(0))
