# SPDX-License-Identifier: Apache-2.0
"""The routes of OpenAI's API that embed texts, so that its clients work unchanged.

Their schema is that of https://platform.openai.com/docs/api-reference/embeddings. Token ids in
place of texts are those of the model's own tokenizer.
"""

from __future__ import annotations

import base64
from typing import Any, Literal

from fastapi import APIRouter, Response
from pydantic import BaseModel, Field

from arrowhead_server.gateway.failures import OpenaiFailure, declared
from arrowhead_server.gateway.web import STARTED, Inputs, Model, Name, Wanted, json, several

router = APIRouter(prefix="/v1", tags=["OpenAI"], responses=declared(OpenaiFailure))


class EmbeddingsRequest(Wanted):
    """Texts to embed. What OpenAI does not know are extras to its clients (`extra_body`)."""

    input: Inputs = Field(
        description="A text, or several; or a text's token ids, or several texts'.",
        examples=["What is Triton?"],
    )
    model: str = Field(description="The served model's name.", examples=["minilm"])
    encoding_format: Literal["float", "base64"] = Field(
        default="float", description="base64: the numbers' bytes; of float32, the lowest first."
    )
    user: str | None = Field(default=None, description="Not looked at.")
    truncate: Literal["none", "start", "end"] = Field(
        default="none",
        description="Where texts longer than the model reads are cut; none: they are an error.",
    )


class Embedding(BaseModel):
    """One text's vector. OpenAI does not know the last two."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str = Field(description="A string if base64 was asked for.")
    tokens: int = Field(description="That the model read.")
    truncated: bool = Field(description="Whether the text has more.")


class Usage(BaseModel):
    """Tokens that the model read, of all texts."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingsResponse(BaseModel):
    """The vectors of a request's texts, in their order."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: Usage


@router.post("/embeddings", response_model=EmbeddingsResponse)
async def embeddings(body: EmbeddingsRequest, model: Model) -> Response:
    """A vector for each text, and how many tokens the model read of it."""
    model.check_name(body.model)
    answer = await model.embed(several(body.input), body.options(truncate=body.truncate))
    base = body.encoding_format == "base64"
    total = sum(answer.tokens)
    return json(
        {
            "object": "list",
            "data": [
                {
                    "object": "embedding",
                    "index": number,
                    "embedding": _base64(vector) if base else vector,
                    "tokens": tokens,
                    "truncated": truncated,
                }
                for number, (vector, tokens, truncated) in enumerate(zip(*answer, strict=True))
            ],
            "model": model.client.model,
            "usage": {"prompt_tokens": total, "total_tokens": total},
        }
    )


@router.get("/models")
async def models(model: Model) -> dict[str, Any]:
    """The model behind this gateway, as a list of one."""
    return {"object": "list", "data": [_described(model.client.model)]}


@router.get("/models/{name}")
async def model_named(name: Name, model: Model) -> dict[str, Any]:
    """The model, if it is called that."""
    model.check_name(name)
    return _described(name)


def _described(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": STARTED, "owned_by": "arrowhead"}


def _base64(vector: Any) -> str:
    return base64.b64encode(vector.astype(vector.dtype.newbyteorder("<")).tobytes()).decode("ascii")
