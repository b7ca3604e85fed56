# SPDX-License-Identifier: Apache-2.0
"""`arrowhead serve`: a `Server`, two signals and a few printed lines."""

import ipaddress
import logging
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from arrowhead_server import logs
from arrowhead_server.address import LOOPBACK, Address
from arrowhead_server.supervisor import Server
from arrowhead_server.triton import interpreter_warning

LOGGER = logging.getLogger(__name__)

_EPILOG = """\b
Examples:
  arrowhead serve
  arrowhead serve --repository /srv/models --http-port 9000
  arrowhead serve --verbose
  arrowhead serve --log-format json --drain 5
  ARROWHEAD_REPOSITORY=/srv/models arrowhead serve
  arrowhead serve --public-key release.pem.pub     (only what `arrowhead sign` signed)

\b
When it says "ready", ask it:
  arrowhead embed "hello world"

Ctrl-C or SIGTERM stops it: at once, or after --drain seconds; a second one stops it at once. A
model that dies or stops answering is restarted; each restart is one line on stderr.
"""


def _ipv4(_context: click.Context, _parameter: click.Parameter, value: str) -> str:
    try:
        return str(ipaddress.IPv4Address(LOOPBACK if value == "localhost" else value))
    except ValueError:
        raise click.BadParameter(f"{value!r} is not an IPv4 address like 127.0.0.1") from None


def _port(name: str, default: int, what: str) -> Callable[[Any], Any]:
    return click.option(
        f"--{name}-port",
        type=click.IntRange(1, 65535),
        default=default,
        show_default=True,
        help=f"Port for {what}.",
    )


@click.command(cls=logs.Command, part="server", epilog=_EPILOG)
@click.option(
    "--repository",
    type=click.Path(path_type=Path),
    default=Path("model_repository"),
    envvar="ARROWHEAD_REPOSITORY",
    show_default=True,
    show_envvar=True,
    help="Folder of models, made by `arrowhead convert`.",
)
@click.option(
    "--host",
    default=LOOPBACK,
    show_default=True,
    callback=_ipv4,
    help="IPv4 address to listen on. Others than loopback are for trusted networks only.",
)
@_port("http", 8000, "HTTP")
@_port("grpc", 8001, "gRPC")
@_port("metrics", 8002, "Prometheus metrics")
@_port("health", 8003, "health: /live, /ready and /metrics of the server itself")
@click.option(
    "--drain",
    "drain_s",
    type=click.FloatRange(min=0),
    default=0.0,
    envvar="ARROWHEAD_DRAIN",
    show_default=True,
    show_envvar=True,
    metavar="SECONDS",
    help="How long to answer on after a first SIGTERM, while /ready says no: longer than a "
    "balancer needs to notice.",
)
@click.option(
    "--public-key",
    type=click.Path(path_type=Path),
    envvar="ARROWHEAD_PUBLIC_KEY",
    show_envvar=True,
    help="Serve only versions that were signed with this key's private one (`arrowhead sign`).",
)
@logs.option()
@click.option("--verbose", is_flag=True, help="Show Triton's whole log, and a line for each batch.")
def serve(
    repository: Path,
    host: str,
    http_port: int,
    grpc_port: int,
    metrics_port: int,
    health_port: int,
    drain_s: float,
    public_key: Path | None,
    log_format: logs.Format,
    verbose: bool,
) -> None:
    """Serve text embeddings from Triton until stopped.

    Serves every model in the repository over HTTP and gRPC, on this machine only unless --host says
    otherwise.
    """
    logs.configure(log_format, "server", logging.INFO if verbose else logging.WARNING)
    if log_format == "json":
        LOGGER.setLevel(logging.INFO)
    if not ipaddress.IPv4Address(host).is_loopback:
        logs.warn(
            log_format,
            f"listening on {host}. Anybody who reaches this port can use the models, and "
            f"a single request can crash the embedded Triton 2.51. Keep it behind a gateway.",
        )
    if (warning := interpreter_warning()) is not None:
        logs.warn(log_format, warning)

    address = Address(host, http_port, grpc_port, metrics_port, health_port)
    with logs.told_in(log_format):
        server = Server(
            repository, address, verbose=verbose, public_key=public_key, drain_s=drain_s
        )
        _run(server, log_format)


def _run(server: Server, log_format: logs.Format) -> None:
    LOGGER.info("starting", extra={"repository": str(server.repository)})
    handlers = {
        number: signal.signal(number, lambda *_: server.request_drain())
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        if server.start():
            models = {model.name: model.version for model in server.models}
            LOGGER.info("ready", extra={"seconds": round(server.ready_s, 3), "models": models})
            if log_format == "text":
                click.echo(_ready_lines(server))
            server.wait()
    finally:
        server.stop()
        LOGGER.info("stopped")
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _ready_lines(server: Server) -> str:
    names = ", ".join(f"{model.name} ({model.dimension})" for model in server.models)
    return (
        f"ready in {server.ready_s:.1f} s\n"
        f"  models   {names}\n"
        f"  HTTP     {server.http_url}\n"
        f"  gRPC     {server.grpc_url}\n"
        f"  metrics  {server.metrics_url}\n"
        f"  health   {server.health_url}/ready"
    )
