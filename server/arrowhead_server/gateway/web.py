# SPDX-License-Identifier: Apache-2.0
"""What routes of either dialect get and give: the model, inputs, options, and JSON."""

from __future__ import annotations

import time
from typing import Annotated, Any, Literal, TypeAlias, TypeVar, get_args

import orjson
from fastapi import Depends, Path, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from arrowhead_client import Options
from arrowhead_server.gateway.asking import Answer, Asking

T = TypeVar("T")
# One wrong value is told. Else pydantic keeps an error of each: a hundred times the body.
Several = Annotated[list[T], Field(fail_fast=True)]
# Ids are those of the model's own tokenizer, special tokens included.
Inputs: TypeAlias = str | Several[str] | Several[int] | Several[Several[int]]
OutputDtype: TypeAlias = Literal["float", "int8", "uint8", "binary", "ubinary"]
OUTPUT_DTYPES: tuple[str, ...] = get_args(OutputDtype)
Name = Annotated[str, Path(description="The served model's name.", examples=["minilm"])]
STARTED = int(time.time())


class Body(BaseModel):
    """A request's: no value in it is taken for one of another type."""

    model_config = ConfigDict(strict=True)


class Wanted(Body):
    """What may be wanted in either dialect, beside the texts."""

    prompt_name: str | None = Field(
        default=None, description="A prompt of the model, put before each text."
    )
    input_type: Literal["query", "document"] | None = Field(
        default=None,
        description="What the texts are: the model's prompt for such, if it has one, is put before "
        "each.",
    )
    dimensions: int | None = Field(
        default=None, description="Keep so many components, then rescale to length 1."
    )
    output_dtype: OutputDtype = Field(
        default="float",
        description="int8 and uint8: 256 steps between the ends of each component's range; binary "
        "and ubinary: eight components a byte.",
    )

    def options(self, **rest: Any) -> Options:
        """As the shared algebra takes it."""
        return Options(
            prompt_name=self.prompt_name,
            input_type=self.input_type,
            dimensions=self.dimensions,
            precision="float32" if self.output_dtype == "float" else self.output_dtype,
            **rest,
        )


async def asking(request: Request) -> Asking:
    """The model behind this gateway."""
    # Not because it waits: a plain function would be run in a thread, which takes 0.3 ms.
    found: Asking = request.app.state.asking
    return found


Model = Annotated[Asking, Depends(asking)]


def several(inputs: Inputs) -> list[str] | list[list[int]]:
    """The texts, or the ids of texts, also where one was given bare."""
    if isinstance(inputs, str):
        return [inputs]
    if inputs and isinstance(inputs[0], int):
        return [inputs]
    return inputs  # type: ignore[return-value]


def json(content: Any, status: int = 200) -> Response:
    """A response; arrays as lists of the shortest numbers that read back as the same float32."""
    body = orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)
    return Response(body, status, media_type="application/json")


def with_counts(response: Response, answer: Answer) -> Response:
    """The response, telling in headers what its dialect's body has no place for."""
    response.headers["x-compute-tokens"] = str(sum(answer.tokens))
    response.headers["x-truncated"] = str(sum(answer.truncated))
    return response
