# SPDX-License-Identifier: Apache-2.0
"""The routes of HuggingFace's text-embeddings-inference, so that its clients work unchanged.

Their schema is that of https://huggingface.github.io/text-embeddings-inference. Differences: token
ids in place of texts are refused, and a text that is too long can be cut at its end only.
"""

from __future__ import annotations

from typing import Any, Literal

from fastapi import APIRouter, Response
from pydantic import BaseModel, Field

from arrowhead_client import InvalidInput, cosine_similarity
from arrowhead_server.gateway.asking import Wish
from arrowhead_server.gateway.web import Model, json

router = APIRouter(tags=["text-embeddings-inference"])


class Cut(BaseModel):
    """What to do with texts that are longer than the model reads."""

    truncate: bool | None = Field(
        default=None, description="Cut them. Else they are an error (413)."
    )
    truncation_direction: Literal["Right", "Left", "right", "left"] = Field(
        default="Right", description="Where they are cut: only at the right."
    )
    prompt_name: str | None = Field(
        default=None, description="A prompt of the model, put before each."
    )

    def wish(self, **rest: Any) -> Wish:
        """As `Asking` takes it."""
        if self.truncation_direction.lower() == "left":
            raise InvalidInput("truncation_direction 'Left': texts are cut at the right only")
        return Wish(prompt_name=self.prompt_name, cut=bool(self.truncate), **rest)


class EmbedRequest(Cut):
    """Texts to embed."""

    inputs: str | list[str] = Field(description="A text, or several.", examples=["What is Triton?"])
    normalize: bool = Field(default=True, description="Scale vectors to length 1.")
    dimensions: int | None = Field(
        default=None, description="Keep so many components, then rescale."
    )


class Sentences(BaseModel):
    """A text, and those to compare it with."""

    source_sentence: str
    sentences: list[str]


class SimilarityRequest(BaseModel):
    """A text to compare with others."""

    inputs: Sentences
    parameters: Cut | None = None


@router.post("/embed", response_model=list[list[float]])
async def embed(body: EmbedRequest, model: Model) -> Response:
    """A vector for each text."""
    texts = [body.inputs] if isinstance(body.inputs, str) else body.inputs
    wish = body.wish(unit_length=body.normalize, dimensions=body.dimensions)
    vectors, _ = await model.embed(texts, wish)
    return json(vectors)


@router.post("/similarity", response_model=list[float])
async def similarity(body: SimilarityRequest, model: Model) -> Response:
    """The cosine of a text with each of the others."""
    wish = (body.parameters or Cut()).wish()
    texts = [body.inputs.source_sentence, *body.inputs.sentences]
    vectors, _ = await model.embed(texts, wish)
    return json(cosine_similarity(vectors[0], vectors[1:])[0])


@router.get("/info")
async def info(model: Model) -> dict[str, Any]:
    """What is served here."""
    (one,) = await model.embedder(["dimension"])
    return {
        "model_id": model.client.model,
        "model_type": {"embedding": {}},
        "dimension": len(one.vector),
        "prompts": await model.client.prompts(),
        "max_client_batch_size": model.most_texts,
        "auto_truncate": False,
    }
