# SPDX-License-Identifier: Apache-2.0
"""`python -m deploy.stack`, for `make stack`."""

from __future__ import annotations

import signal
from pathlib import Path

import click

from deploy.stack.stack import DEPLOY, Stack, StackError


@click.command()
@click.option(
    "--repository",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    default=DEPLOY.parent / "model_repository",
    help="Folder of models.",
)
@click.option(
    "--replicas", type=click.IntRange(1, 9), default=3, show_default=True, help="Tritons."
)
@click.option("--gateways", type=click.IntRange(1, 9), default=2, show_default=True)
@click.option("--prefix", default="127.0.0", show_default=True, help="Of all addresses.")
def main(repository: Path, replicas: int, gateways: int, prefix: str) -> None:
    """Run Tritons, gateways, HAProxy and Prometheus until Ctrl-C."""
    # From here on both signals end a wait, and the stack goes down in order.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    stack = Stack(
        repository, replicas=replicas, gateways=gateways, prefix=prefix, on_ready=click.echo
    )
    try:
        with stack:
            click.echo(_ready(stack))
            while True:
                signal.pause()
    except KeyboardInterrupt:
        click.echo("stopped")
    except StackError as error:
        raise click.ClickException(str(error)) from error


def _interrupt(*_: object) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the stop itself takes seconds, and is not cut short
    raise KeyboardInterrupt


def _ready(stack: Stack) -> str:
    return f"""ready
  gateways    {stack.gateway_url}
  Triton      {stack.grpc_url}   {stack.http_url}
  HAProxy     {stack.haproxy_url}/stats
  Prometheus  {stack.prometheus_url}/targets
  logs        {stack.folder}/logs

Ask it, in another terminal:
  curl {stack.gateway_url}/embed -H 'Content-Type: application/json' -d '{{"inputs": "a text"}}'
  .venv/bin/arrowhead embed --url {stack.grpc_url} "a text"

Kill a Triton and ask again:
  kill -9 $(pgrep -f 'serve .*--host {stack.address("triton1")}')

Ctrl-C stops everything."""


if __name__ == "__main__":
    main()
