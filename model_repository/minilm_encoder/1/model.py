# SPDX-License-Identifier: Apache-2.0
"""input_ids, length -> embeddings. Decodes requests, calls the engine, encodes answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils

from arrowhead_engine.compute import instance_device
from arrowhead_engine.encoder import Encoder
from arrowhead_engine.errors import InvalidInput
from arrowhead_engine.spec import Ids


class TritonPythonModel:
    """All requests of a batch go through the network together, packed, whatever their lengths."""

    def initialize(self, args: dict[str, str]) -> None:
        parameters = json.loads(args["model_config"])["parameters"]
        self.encoder = Encoder.open(
            Path(args["model_repository"]).resolve() / args["model_version"] / "weights.parquet",
            device=instance_device(args["model_instance_kind"], args["model_instance_device_id"]),
            dtype=parameters["compute_dtype"]["string_value"],
        )
        # Raises, and so keeps the model from being ready, unless its vectors are the certified.
        self.encoder.verify()

    def execute(self, requests: list[Any]) -> list[Any]:
        rows: list[Ids] = []
        parts: list[slice | InvalidInput] = []
        for request in requests:
            # Views of Triton's memory, gone when execute returns; the engine copies what it keeps.
            input_ids = pb_utils.get_input_tensor_by_name(request, "input_ids").as_numpy()
            length = pb_utils.get_input_tensor_by_name(request, "length").as_numpy()
            try:
                own = self.encoder.check(input_ids, length)
            except InvalidInput as error:
                parts.append(error)
            else:
                parts.append(slice(len(rows), len(rows) + len(own)))
                rows += own
        embeddings = self.encoder.embed(rows)
        return [
            _error(part)
            if isinstance(part, InvalidInput)
            else pb_utils.InferenceResponse([pb_utils.Tensor("embeddings", embeddings[part])])
            for part in parts
        ]


def _error(error: InvalidInput) -> Any:
    # An answer of its own: a raised exception would fail the neighbours in the batch too.
    return pb_utils.InferenceResponse(
        error=pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG)
    )
