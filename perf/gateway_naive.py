# SPDX-License-Identifier: Apache-2.0
"""What one would write in place of a gateway: `python -m perf.gateway_naive URL PORT`.

POST /embed takes {"inputs": [...]} and asks Triton for just that, by the same client, and answers
by the same JSON. It remembers nothing, merges nothing, counts nothing and limits nothing.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import orjson
import uvicorn
from fastapi import FastAPI, Request, Response
from pydantic import BaseModel

from arrowhead_client import AsyncClient

# Nothing of perf/ is imported: what it takes to start, and its memory, are measured.
PART = 100  # texts in a request to Triton, as the gateway has it


class Texts(BaseModel):
    """A request's body."""

    inputs: list[str]


def make_app(url: str) -> FastAPI:
    """The application, with one route."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncClient(url, batch_size=PART) as app.state.client:
            yield

    app = FastAPI(lifespan=lifespan)

    @app.post("/embed")
    async def embed(body: Texts, request: Request) -> Response:
        vectors = await request.app.state.client.embed(body.inputs, progress=False)
        content = orjson.dumps(vectors, option=orjson.OPT_SERIALIZE_NUMPY)
        return Response(content, media_type="application/json")

    return app


def main() -> None:
    """Serves on loopback."""
    url, port = sys.argv[1:]
    app = make_app(url)
    uvicorn.run(app, host="127.0.0.1", port=int(port), log_level="warning", access_log=False)


if __name__ == "__main__":
    main()
