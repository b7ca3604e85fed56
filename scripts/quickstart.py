# SPDX-License-Identifier: Apache-2.0
"""`make quickstart`: starts Triton on the converted model, embeds a few sentences, stops."""

from __future__ import annotations

import time
from pathlib import Path

from arrowhead_client import ArrowheadError, Client
from arrowhead_server.address import LOOPBACK, Address, check_ports, free_address
from arrowhead_server.errors import PortInUseError, ServerError
from arrowhead_server.supervisor import running_server

REPOSITORY = Path(__file__).parents[1] / "model_repository"
SENTENCES = [
    "A man is playing a guitar on the street.",
    "Someone performs music outdoors.",
    "The stock market fell sharply today.",
    "Shares dropped on Tuesday.",
]
NEXT = r"""
Try it yourself. In one terminal:

  make serve

In another:

  curl -s localhost:8000/v2/models/minilm/infer -d \
    '{"inputs":[{"name":"text","shape":[1,1],"datatype":"BYTES","data":["hello"]}]}'

  .venv/bin/python -c "from arrowhead_client import Client; \
    print(Client('grpc://localhost:8001').embed('hello')[:5])"

  .venv/bin/arrowhead similarity "a cat" "a kitten" "the stock market"
"""


def main() -> None:
    """Shows, in a few seconds, that everything works here."""
    address = Address(LOOPBACK)
    try:
        check_ports(address)
    except PortInUseError:
        address = free_address()  # something else runs on 8000-8002; no reason not to show this
    with running_server(REPOSITORY, address) as server, Client(server.grpc_url) as client:
        print(f"Triton is ready after {server.ready_s:.1f} s")
        print(f"  HTTP     {server.http_url}")
        print(f"  gRPC     {server.grpc_url}")
        print(f"  metrics  {server.metrics_url}\n")
        started = time.perf_counter()
        vectors = client.embed(SENTENCES)
        took_ms = (time.perf_counter() - started) * 1e3
        print(f"{len(SENTENCES)} sentences -> {vectors.shape[1]} dimensions in {took_ms:.0f} ms")
        print("their similarities:\n")
        for i, (sentence, row) in enumerate(
            zip(SENTENCES, client.similarity(SENTENCES), strict=True)
        ):
            print(f"  {i}  {'  '.join(f'{value:5.2f}' for value in row)}   {sentence}")
    print("\nStopped." + NEXT)


if __name__ == "__main__":
    try:
        main()
    except (ArrowheadError, ServerError) as error:
        raise SystemExit(f"quickstart: {error}") from error
