# SPDX-License-Identifier: Apache-2.0
"""onnxruntime. Variants are files: float32, int8-tensor, int8-channel (see `quantize`)."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import onnxruntime

from perf.peers.batching import Vectors
from perf.peers.engines import cores
from perf.peers.padding import Ids, PaddedEncoder


def open_encoder(variant: str, folder: Path) -> PaddedEncoder:
    """The file `variant`.onnx in `folder`, all graph optimizations, all cores for one call."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = cores()
    options.inter_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    session = onnxruntime.InferenceSession(
        str(folder / f"{variant}.onnx"), options, providers=["CPUExecutionProvider"]
    )

    def run(input_ids: Ids, mask: Ids) -> Vectors:
        feeds = {"input_ids": input_ids, "attention_mask": mask}
        return cast(Vectors, session.run(None, feeds)[0])

    return PaddedEncoder(folder, run)
