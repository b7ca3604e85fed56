# SPDX-License-Identifier: Apache-2.0
"""text -> input_ids, length, truncated; what tokens stand for and what the model is, if asked for.

Decodes requests, calls the engine, encodes answers.
"""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from arrowhead_engine.account import Account, Batch
from arrowhead_engine.errors import InvalidInput
from arrowhead_engine.spec import info, read_metadata
from arrowhead_engine.stillness import Stillness
from arrowhead_engine.tokenizer import Tokenizer, utf8

FILES = ("tokenizer", "metadata")  # of a model, as JSON; outputs of the same names


class TritonPythonModel:
    """Texts of all requests in a batch are tokenized in one call."""

    def initialize(self, args: dict[str, str]) -> None:
        self.folder = Path(args["model_repository"]).resolve() / args["model_version"]
        self.tokenizer = Tokenizer.open(self.folder)
        self.info = json.dumps(info(read_metadata(self.folder / "metadata.json"))).encode()
        family = partial(pb_utils.MetricFamily, kind=pb_utils.MetricFamily.COUNTER)
        self.account = Account(
            args["model_name"], args["model_version"], family, args["model_instance_name"]
        )
        self.stillness = Stillness(self.account.tell)

    def execute(self, requests: list[Any]) -> list[Any]:
        began = time.perf_counter()
        try:
            return self._answers(requests, began)
        finally:  # an exception is an answer, too
            self.stillness.check(began)

    def _answers(self, requests: list[Any], began: float) -> list[Any]:
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
        answers = [
            _error(part)
            if isinstance(part, InvalidInput)
            else self._answer(request, texts[part], ids[part], truncated[part])
            for request, part in zip(requests, parts, strict=True)
        ]
        self.account.add(
            Batch(
                texts=len(texts),
                tokens=sum(map(len, ids)),
                truncated=sum(truncated),
                refused=[part for part in parts if isinstance(part, InvalidInput)],
                seconds=time.perf_counter() - began,
            ),
            lambda: [request.request_id() for request in requests],
        )
        return answers

    def finalize(self) -> None:
        self.stillness.close()
        self.account.close()

    def _answer(
        self, request: Any, texts: list[str], ids: list[list[int]], truncated: list[bool]
    ) -> Any:
        outputs: dict[str, Any] = self.tokenizer.pad(ids, truncated)._asdict()
        wanted = request.requested_output_names()  # an ensemble's are those that it maps
        if "offsets" in wanted or "tokens" in wanted:
            outputs |= self.tokenizer.spans(texts, ids)._asdict()
        if "info" in wanted:
            outputs["info"] = _once(self.info, len(texts))
        for name in FILES:
            if name in wanted:
                outputs[name] = _once((self.folder / f"{name}.json").read_bytes(), len(texts))
        return pb_utils.InferenceResponse(
            [pb_utils.Tensor(name, outputs[name]) for name in wanted if name in outputs]
        )


def _once(value: bytes, rows: int) -> Any:
    # It may be megabytes: a request of many texts has it in its first row alone.
    column = np.full((rows, 1), b"", np.object_)
    column[:1] = value
    return column


def _error(error: InvalidInput) -> Any:
    # An answer of its own: a raised exception would fail the neighbours in the batch too.
    return pb_utils.InferenceResponse(
        error=pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG)
    )
