# SPDX-License-Identifier: Apache-2.0
"""The routes of HuggingFace's text-embeddings-inference, so that its clients work unchanged.

Their schema is that of https://huggingface.github.io/text-embeddings-inference. What TEI does not
know is added beside it: fields with defaults in requests, headers in answers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any, Literal

import orjson
from fastapi import APIRouter, Response
from pydantic import Field

from arrowhead_client import Options, cosine_similarity
from arrowhead_client._options import check_lengths
from arrowhead_client._plan import Tokenized
from arrowhead_server.gateway.call import CALL
from arrowhead_server.gateway.failures import TeiFailure, declared
from arrowhead_server.gateway.web import (
    OUTPUT_DTYPES,
    Body,
    Inputs,
    Model,
    Several,
    Wanted,
    json,
    several,
    with_counts,
)

router = APIRouter(tags=["text-embeddings-inference"], responses=declared(TeiFailure))


class Cut(Body):
    """What to do with texts that are longer than the model reads."""

    truncate: bool | None = Field(
        default=None, description="Cut them. Else they are an error (413)."
    )
    truncation_direction: Literal["Right", "Left", "right", "left"] = Field(
        default="Right", description="Which side is cut; the left one up to a word."
    )

    def side(self) -> Literal["none", "start", "end"]:
        """As the shared algebra says it."""
        if not self.truncate:
            return "none"
        return "start" if self.truncation_direction.lower() == "left" else "end"


class EmbedRequest(Cut, Wanted):
    """Texts to embed."""

    inputs: Inputs = Field(
        description="A text, or several; or a text's token ids, or several texts'.",
        examples=["What is Triton?"],
    )
    normalize: bool = Field(default=True, description="Scale vectors to length 1.")


class Sentences(Body):
    """A text, and those to compare it with."""

    source_sentence: str
    sentences: Several[str] = Field(min_length=1)


class Sides(Cut):
    """A prompt for both sides, or one for each."""

    prompt_name: str | None = Field(default=None, description="A prompt put before every text.")
    source_prompt_name: str | None = Field(
        default=None, description="In place of it, the source sentence's prompt."
    )
    sentences_prompt_name: str | None = Field(
        default=None, description="In place of it, the other sentences' prompt."
    )
    source_input_type: Literal["query", "document"] | None = Field(
        default=None, description="What the source sentence is, for the model's own prompt."
    )
    sentences_input_type: Literal["query", "document"] | None = Field(
        default=None, description="What the other sentences are."
    )

    def options(self) -> tuple[Options, Options]:
        """Of the source sentence, and of the others."""
        sides = (
            (self.source_prompt_name, self.source_input_type),
            (self.sentences_prompt_name, self.sentences_input_type),
        )
        source, sentences = (
            Options(
                prompt_name=name or (None if kind else self.prompt_name),
                input_type=kind,
                truncate=self.side(),
            )
            for name, kind in sides
        )
        return source, sentences


class SimilarityRequest(Body):
    """A text to compare with others."""

    inputs: Sentences
    parameters: Sides | None = None


class TokenizeRequest(Body):
    """Texts to tokenize."""

    inputs: str | Several[str] = Field(description="A text, or several.", examples=["a text"])
    add_special_tokens: bool = Field(default=True, description="Tell the special tokens too.")
    prompt_name: str | None = Field(
        default=None, description="A prompt of the model, put before each text."
    )
    truncate: bool = Field(
        default=False, description="Tell only what the model reads of a text; else it is an error."
    )


@router.post("/", include_in_schema=False)
@router.post("/embed", response_model=list[list[float]])
async def embed(body: EmbedRequest, model: Model) -> Response:
    """A vector for each text."""
    options = body.options(truncate=body.side(), normalize=body.normalize)
    answer = await model.embed(several(body.inputs), options)
    return with_counts(json(answer.vectors), answer)


@router.post("/similarity", response_model=list[float])
async def similarity(body: SimilarityRequest, model: Model) -> Response:
    """The cosine of a text with each of the others."""
    source, sentences = (body.parameters or Sides()).options()
    texts = [body.inputs.source_sentence, *body.inputs.sentences]
    if source == sentences:
        answer = await model.embed(texts, source)
    else:
        answer = await model.embed_all((texts[:1], source), (texts[1:], sentences))
    return with_counts(json(cosine_similarity(answer.vectors[0], answer.vectors[1:])[0]), answer)


@router.post("/tokenize", response_model=list[list[dict[str, Any]]])
async def tokenize(body: TokenizeRequest, model: Model) -> Response:
    """The tokens that the model reads of each text, and which characters they are."""
    texts = [body.inputs] if isinstance(body.inputs, str) else body.inputs
    model.check(texts)
    prefix = await model.prefix(Options(prompt_name=body.prompt_name))
    call = CALL.get()
    name = None if call is None else call.request_id
    found = await model.client.tokenize(texts, prompt=prefix, request_id=name)
    if call is not None:
        call.texts, call.tokens = len(found), sum(len(one.tokens) for one in found)
    if not body.truncate:
        check_lengths([len(one.tokens) for one in found], [one.truncated for one in found])
    told = await asyncio.to_thread(_listed, found, special=body.add_special_tokens)
    return Response(told, media_type="application/json")


@router.get("/info")
async def info(model: Model) -> dict[str, Any]:
    """What is served here: TEI's fields, then ours."""
    told = await model.info()
    return {
        "model_id": told.name,  # not its source, which may be a folder of the server's
        "model_sha": told.certificate.get("weights_sha256"),
        "model_dtype": "float32",
        "model_type": {"embedding": {"pooling": told.pooling}},
        "max_input_length": told.max_seq_length,
        "max_client_batch_size": model.most_texts,
        "auto_truncate": False,
        "version": version("arrowhead"),
        "model_version": told.version,
        "dimension": told.dimension,
        "normalize": told.normalize,
        "prompts": dict(told.prompts),
        "output_dtypes": [
            kind for kind in OUTPUT_DTYPES if told.ranges is not None or "int" not in kind
        ],
        "fingerprint": told.fingerprint,
        "certificate": dict(told.certificate),
    }


def _listed(found: Sequence[Tokenized], *, special: bool) -> bytes:
    """As JSON; made text by text, for as dictionaries tokens take several times the memory."""
    texts = (
        orjson.dumps([token._asdict() for token in one.tokens if special or not token.special])
        for one in found
    )
    return b"[%b]" % b",".join(texts)
