# SPDX-License-Identifier: Apache-2.0
"""text -> input_ids, length, truncated. Decodes requests, calls the engine, encodes answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils

from arrowhead_engine.errors import InvalidInput
from arrowhead_engine.tokenizer import Tokenizer, utf8


class TritonPythonModel:
    """Texts of all requests in a batch are tokenized in one call."""

    def initialize(self, args: dict[str, str]) -> None:
        self.tokenizer = Tokenizer.open(
            Path(args["model_repository"]).resolve() / args["model_version"]
        )

    def execute(self, requests: list[Any]) -> list[Any]:
        texts: list[str] = []
        parts: list[slice | InvalidInput] = []
        for request in requests:
            raw = pb_utils.get_input_tensor_by_name(request, "text").as_numpy()
            try:
                own = utf8(raw.ravel())
            except InvalidInput as error:
                parts.append(error)
            else:
                parts.append(slice(len(texts), len(texts) + len(own)))
                texts += own
        ids, truncated = self.tokenizer.encode(texts)
        return [
            _error(part)
            if isinstance(part, InvalidInput)
            else self._answer(ids[part], truncated[part])
            for part in parts
        ]

    def _answer(self, ids: list[list[int]], truncated: list[bool]) -> Any:
        tokens = self.tokenizer.pad(ids, truncated)
        return pb_utils.InferenceResponse(
            [pb_utils.Tensor(name, value) for name, value in tokens._asdict().items()]
        )


def _error(error: InvalidInput) -> Any:
    # An answer of its own: a raised exception would fail the neighbours in the batch too.
    return pb_utils.InferenceResponse(
        error=pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG)
    )
