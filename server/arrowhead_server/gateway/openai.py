# SPDX-License-Identifier: Apache-2.0
"""The routes of OpenAI's API that embed texts, so that its clients work unchanged.

Their schema is that of https://platform.openai.com/docs/api-reference/embeddings. In place of texts
it also allows token ids: they are refused, being another tokenizer's.
"""

from __future__ import annotations

import base64
import time
from typing import Any, Literal

import numpy as np
from fastapi import APIRouter, Response
from pydantic import BaseModel, Field

from arrowhead_server.gateway.asking import Wish
from arrowhead_server.gateway.failures import UnknownModel
from arrowhead_server.gateway.web import Model, json

router = APIRouter(prefix="/v1", tags=["OpenAI"])
_STARTED = int(time.time())


class EmbeddingsRequest(BaseModel):
    """Texts to embed. `prompt_name` and `truncate` are ours, extras to OpenAI's clients."""

    input: str | list[str] = Field(description="A text, or several.", examples=["What is Triton?"])
    model: str = Field(description="The served model's name.", examples=["minilm"])
    encoding_format: Literal["float", "base64"] = Field(
        default="float", description="base64: float32, lowest byte first."
    )
    dimensions: int | None = Field(
        default=None, description="Keep so many components, then rescale."
    )
    user: str | None = Field(default=None, description="Not looked at.")
    prompt_name: str | None = Field(
        default=None, description="A prompt of the model, put before each."
    )
    truncate: Literal["none", "end"] = Field(
        default="none", description="Cut texts longer than the model reads; else they are an error."
    )


@router.post("/embeddings")
async def embeddings(body: EmbeddingsRequest, model: Model) -> Response:
    """A vector for each text."""
    if body.model != model.client.model:
        raise UnknownModel(f"no model {body.model!r} here; wanted {model.client.model!r}")
    texts = [body.input] if isinstance(body.input, str) else body.input
    wish = Wish(body.prompt_name, cut=body.truncate == "end", dimensions=body.dimensions)
    vectors, embedded = await model.embed(texts, wish)
    tokens = sum(one.tokens for one in embedded)
    base = body.encoding_format == "base64"
    return json(
        {
            "object": "list",
            "data": [
                {
                    "object": "embedding",
                    "index": number,
                    "embedding": _base64(vector) if base else vector,
                    "truncated": one.truncated,
                }
                for number, (vector, one) in enumerate(zip(vectors, embedded, strict=True))
            ],
            "model": model.client.model,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }
    )


@router.get("/models")
async def models(model: Model) -> dict[str, Any]:
    """The model behind this gateway, as a list of one."""
    name = model.client.model
    one = {"id": name, "object": "model", "created": _STARTED, "owned_by": "arrowhead"}
    return {"object": "list", "data": [one]}


def _base64(vector: np.ndarray[Any, np.dtype[np.float32]]) -> str:
    return base64.b64encode(vector.astype("<f4", copy=False).tobytes()).decode("ascii")
