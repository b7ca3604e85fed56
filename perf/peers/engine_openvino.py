# SPDX-License-Identifier: Apache-2.0
"""OpenVINO on the float32 ONNX file. Variants are its precision hint: f32, bf16."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openvino

from perf.peers.batching import Vectors
from perf.peers.engines import cores
from perf.peers.padding import Ids, PaddedEncoder


def open_encoder(variant: str, folder: Path) -> PaddedEncoder:
    """float32.onnx in `folder`, one stream with all cores: the latency hint."""
    core = openvino.Core()
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": "1",
        "INFERENCE_NUM_THREADS": str(cores()),
        "INFERENCE_PRECISION_HINT": variant,
    }
    model = core.compile_model(core.read_model(str(folder / "float32.onnx")), "CPU", settings)
    request = model.create_infer_request()

    def run(input_ids: Ids, mask: Ids) -> Vectors:
        feeds = {"input_ids": input_ids, "attention_mask": mask}
        # A copy: the request's own tensor is written again by the next call.
        return np.array(request.infer(feeds)[model.output(0)], np.float32)

    return PaddedEncoder(folder, run)
