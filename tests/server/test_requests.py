# SPDX-License-Identifier: Apache-2.0
"""What the dialects' requests say of wrong values: one error, however many there are."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from arrowhead_server.gateway.openai import EmbeddingsRequest
from arrowhead_server.gateway.tei import EmbedRequest, SimilarityRequest, TokenizeRequest
from arrowhead_server.gateway.triton import InferRequest

WRONG = [0.5] * 1000


def tensor(**fields: Any) -> dict[str, Any]:
    whole = {"name": "text", "shape": [1], "datatype": "BYTES", "data": ["a"], **fields}
    return {"inputs": [whole]}


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (EmbedRequest, {"inputs": WRONG}),
        (EmbedRequest, {"inputs": [WRONG] * 10}),
        (EmbeddingsRequest, {"model": "minilm", "input": WRONG}),
        (SimilarityRequest, {"inputs": {"source_sentence": "a", "sentences": WRONG}}),
        (TokenizeRequest, {"inputs": WRONG}),
        (InferRequest, tensor(shape=WRONG)),
        (InferRequest, tensor(data=WRONG)),
        (InferRequest, tensor(data=[WRONG] * 10)),
        (InferRequest, {"inputs": WRONG}),
    ],
)
def test_of_many_wrong_values_few_are_told(kind: type[BaseModel], body: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(body)
    assert caught.value.error_count() <= 4  # one of each way to read it
