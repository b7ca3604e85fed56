# SPDX-License-Identifier: Apache-2.0
"""The checkpoint as one ONNX file: `python -m perf.peers.export CHECKPOINT FILE`.

Ids and mask go in, finished vectors come out: network, mean of the real tokens, unit length. The
older exporter: its graph is the one whose patterns onnxruntime knows, and runs a little faster.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer


class Pipeline(torch.nn.Module):
    """What `SentenceTransformer` does between ids and vectors, for this model."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        # [B, S, H]
        hidden = self.network(input_ids=input_ids, attention_mask=attention_mask)[0]
        weights = attention_mask.unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * weights).sum(1) / weights.sum(1)
        return torch.nn.functional.normalize(mean, dim=1)


def main() -> None:
    """Writes the file; proves nothing: the page compares what each server answers."""
    checkpoint, file = sys.argv[1], Path(sys.argv[2])
    warnings.filterwarnings("ignore")  # the exporter's, about a path that is not taken
    model: Any = SentenceTransformer(
        checkpoint,
        device="cpu",
        local_files_only=True,
        model_kwargs={"attn_implementation": "eager", "dtype": torch.float32},
    )
    example = torch.ones(2, 7, dtype=torch.long)
    rows = {0: "texts", 1: "tokens"}
    torch.onnx.export(
        Pipeline(model[0].auto_model).eval(),
        (example, example),
        str(file),
        input_names=["input_ids", "attention_mask"],
        output_names=["embeddings"],
        dynamic_axes={"input_ids": rows, "attention_mask": rows, "embeddings": {0: "texts"}},
        opset_version=17,
        dynamo=False,
    )


if __name__ == "__main__":
    main()
