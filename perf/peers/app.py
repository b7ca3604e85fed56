# SPDX-License-Identifier: Apache-2.0
"""A small FastAPI server around an engine: `python -m perf.peers.app ENGINE VARIANT FOLDER PORT`.

POST /embed takes {"texts": [...]}, read by orjson, and answers with the vectors' bytes: float32,
little-endian, row by row. That is the cheapest answer there is, and what Triton sends too.
"""

from __future__ import annotations

import sys
from pathlib import Path

import orjson
import uvicorn
from fastapi import FastAPI, Request, Response

from perf.peers.batching import Batcher
from perf.peers.engines import open_encoder


def make_app(batcher: Batcher) -> FastAPI:
    """The application, with one route."""

    async def embed(request: Request) -> Response:
        texts = orjson.loads(await request.body())["texts"]
        vectors = await batcher.embed(texts)
        return Response(vectors.tobytes(), media_type="application/octet-stream")

    app = FastAPI()
    app.add_route("/embed", embed, methods=["POST"])
    return app


def main() -> None:
    """Loads the model, then listens on loopback: who can connect is answered."""
    engine, variant, folder, port = sys.argv[1:]
    batcher = Batcher(open_encoder(engine, variant, Path(folder)).encode)
    uvicorn.run(
        make_app(batcher),
        host="127.0.0.1",
        port=int(port),
        loop="uvloop",
        http="httptools",
        log_level="warning",
        access_log=False,
    )


if __name__ == "__main__":
    main()
