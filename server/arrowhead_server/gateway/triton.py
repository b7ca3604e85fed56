# SPDX-License-Identifier: Apache-2.0
"""Triton's own route for JSON, so that LiteLLM's `triton/` provider works unchanged.

Its schema is that of https://github.com/kserve/open-inference-protocol, as far as texts to vectors
need it: one tensor of texts in, one of numbers out. Texts are remembered, and asked for once, as in
the other dialects, and cut at their end where they are too long, as by Triton itself.
"""

from __future__ import annotations

from typing import Any, Literal

from fastapi import APIRouter, Response
from pydantic import BaseModel, Field, NonNegativeInt

from arrowhead_client import InvalidInput, Options
from arrowhead_server.gateway.failures import TritonFailure, declared
from arrowhead_server.gateway.web import Body, Model, Name, Several, json, with_counts

# LiteLLM names no Content-Type when it does not wait asynchronously. What a web page could send so
# changes nothing here, and it may not read the answer.
router = APIRouter(
    prefix="/v2",
    tags=["Triton"],
    strict_content_type=False,
    responses=declared(TritonFailure),
)


class Texts(Body):
    """Texts, as a tensor."""

    name: Literal["text", "input_text"] = Field(
        description="`text` is the served model's own name for it, `input_text` LiteLLM's."
    )
    shape: Several[NonNegativeInt] = Field(description="[N] or [N, 1].", examples=[[1]])
    datatype: Literal["BYTES"]
    data: str | Several[str] | Several[Several[str]] = Field(
        description="N texts. Of one that stands bare, as LiteLLM sends it, no shape is asked.",
        examples=[["What is Triton?"]],
    )

    def several(self) -> list[str]:
        """The texts, if they are as many as the shape says."""
        if isinstance(self.data, str):
            return [self.data]
        texts = [text for row in self.data for text in ([row] if isinstance(row, str) else row)]
        if self.shape not in ([len(texts)], [len(texts), 1]):
            raise InvalidInput(
                f"shape {self.shape} for {len(texts)} texts: wanted [{len(texts)}, 1]"
            )
        return texts


class InferRequest(Body):
    """A request for vectors. What else the protocol has is not looked at."""

    id: str | None = Field(default=None, description="Comes back in the answer.")
    inputs: Several[Texts] = Field(min_length=1, max_length=1)


class Vectors(BaseModel):
    """Vectors, as a tensor."""

    name: Literal["embeddings"]
    datatype: Literal["FP32"]
    shape: tuple[int, int] = Field(description="[N, D].")
    data: list[float] = Field(description="Row after row.")


class InferResponse(BaseModel):
    """The vectors of a request's texts."""

    id: str | None = Field(default=None, description="The request's, if it had one.")
    model_name: str
    outputs: list[Vectors]


@router.post("/models/{name}/infer", response_model=InferResponse)
async def infer(name: Name, body: InferRequest, model: Model) -> Response:
    """A vector for each text, in one list of numbers."""
    model.check_name(name)
    found = await model.embed(body.inputs[0].several(), Options(truncate="end"))
    answer: dict[str, Any] = {
        "model_name": name,
        "outputs": [
            {
                "name": "embeddings",
                "datatype": "FP32",
                "shape": found.vectors.shape,
                "data": found.vectors.reshape(-1),
            }
        ],
    }
    return with_counts(json(answer if body.id is None else {"id": body.id, **answer}), found)
