# SPDX-License-Identifier: Apache-2.0
"""`arrowhead gateway`: the application, served by uvicorn."""

from __future__ import annotations

import click
import uvicorn

from arrowhead_client._url import DEFAULT_URL, parse_url
from arrowhead_server.address import LOOPBACK
from arrowhead_server.gateway.app import MOST_BODY_MB, Settings, create_app
from arrowhead_server.gateway.asking import MOST_TEXTS
from arrowhead_server.gateway.embedder import ENTRIES

_EPILOG = """\b
Examples:
  arrowhead gateway
  arrowhead gateway --url grpc://10.0.0.5:8001 --port 9000
  curl localhost:8080/embed -H 'Content-Type: application/json' -d '{"inputs": "a text"}'

\b
With OpenAI's client:
  OpenAI(base_url="http://localhost:8080/v1", api_key="none").embeddings.create(
      model="minilm", input=["a text"])

A page to try it with is at /, that of all routes at /docs.
"""


@click.command(epilog=_EPILOG)
@click.option(
    "--url",
    envvar="ARROWHEAD_URL",
    show_envvar=True,
    default=DEFAULT_URL,
    show_default=True,
    help="Triton: grpc://host:port or http://host:port.",
)
@click.option("--model", default="minilm", show_default=True, help="The model's name there.")
@click.option("--host", default=LOOPBACK, show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(1, 65535), default=8080, show_default=True)
@click.option(
    "--cache",
    type=click.IntRange(1),
    default=ENTRIES,
    show_default=True,
    help="Texts whose vectors are remembered.",
)
@click.option(
    "--in-flight",
    type=click.IntRange(1),
    default=256,
    show_default=True,
    help="Requests under way at once; more are answered with 429.",
)
@click.option(
    "--max-texts",
    type=click.IntRange(1),
    default=MOST_TEXTS,
    show_default=True,
    help="Texts in a request; Triton is asked in parts of 100.",
)
@click.option(
    "--max-body-mb",
    type=click.FloatRange(min=0, min_open=True),
    default=MOST_BODY_MB,
    show_default=True,
    help="Of a request's body; more is answered with 413.",
)
def gateway(
    url: str,
    model: str,
    host: str,
    port: int,
    cache: int,
    in_flight: int,
    max_texts: int,
    max_body_mb: float,
) -> None:
    """Serve JSON over HTTP in front of Triton: TEI's and OpenAI's routes.

    On this machine only, unless --host says otherwise. It needs a running `arrowhead serve`.
    """
    parse_url(url)  # a wrong one is told now, not at the first request
    settings = Settings(
        url,
        model,
        entries=cache,
        in_flight=in_flight,
        most_texts=max_texts,
        most_body_mb=max_body_mb,
    )
    click.echo(f"gateway for {model} at {url}: http://{host}:{port}/docs")
    uvicorn.run(create_app(settings), host=host, port=port, log_level="warning", access_log=False)
