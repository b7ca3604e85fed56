# SPDX-License-Identifier: Apache-2.0
"""`arrowhead gateway`: the application, served by uvicorn. And `arrowhead gateway-key`."""

from __future__ import annotations

import ipaddress
import logging
import math
import os
import re
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import click
import uvicorn
from click.core import ParameterSource

from arrowhead_client import _tracing
from arrowhead_client._url import DEFAULT_URL, parse_url
from arrowhead_server import logs
from arrowhead_server.address import LOOPBACK
from arrowhead_server.gateway.access import KEYS_VARIABLE
from arrowhead_server.gateway.app import create_app
from arrowhead_server.gateway.asking import MOST_CHARACTERS, MOST_TEXTS
from arrowhead_server.gateway.bodies import MB, PER_TEXT
from arrowhead_server.gateway.call import EVENTS, with_request_id
from arrowhead_server.gateway.draining import DrainingServer
from arrowhead_server.gateway.embedder import ENTRIES, PART_TEXTS
from arrowhead_server.gateway.keys import add, line, new
from arrowhead_server.gateway.protocol import CappedProtocol
from arrowhead_server.gateway.reread import check_private
from arrowhead_server.gateway.settings import (
    IN_FLIGHT,
    MOST_BODY_MB,
    MOST_MEMORY_MB,
    BadSetting,
    Settings,
    TokenSettings,
)

_EPILOG = """\b
Examples:
  arrowhead gateway
  arrowhead gateway --url grpc://10.0.0.5:8001 --port 9000
  arrowhead gateway --log-format json --drain 5
  curl localhost:8080/embed -H 'Content-Type: application/json' -d '{"inputs": "a text"}'

\b
With OpenAI's client:
  OpenAI(base_url="http://localhost:8080/v1", api_key="none").embeddings.create(
      model="minilm", input=["a text"])

\b
For others than this machine, with keys, TLS and a rate:
  arrowhead gateway-key alice --keys gateway.keys     # prints alice's key, keeps its hash
  arrowhead gateway --host 0.0.0.0 --keys gateway.keys --rate 100/second \\
      --tls-cert cert.pem --tls-key key.pem

A page to try it with is at /, that of all routes at /docs.
"""


class Topic(click.Option):
    """An option that stands under a heading in `--help`."""

    def __init__(self, *args: Any, topic: str, **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        self.topic = topic


class Topics(logs.Command):
    """A command whose options are listed by topic."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """A list for each topic, in the order in which they first come."""
        topics: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            if (record := parameter.get_help_record(ctx)) is not None:
                topics.setdefault(getattr(parameter, "topic", "Other"), []).append(record)
        for topic, records in topics.items():
            with formatter.section(topic):
                formatter.write_dl(records)


def _option(topic: str, *names: str, **attributes: Any) -> Callable[[Any], Any]:
    if "default" in attributes:
        attributes["show_default"] = True
    if "envvar" in attributes:
        attributes["show_envvar"] = True
    if isinstance(attributes.get("type"), (click.IntRange, click.FloatRange)):
        attributes.setdefault("metavar", "N")
    return click.option(*names, cls=Topic, topic=topic, **attributes)


def _origin(_context: click.Context, _parameter: click.Parameter, value: tuple[str, ...]) -> Any:
    for origin in value:
        if origin != "*" and not re.fullmatch(r"https?://[^/\s]+", origin):
            raise click.BadParameter(f"{origin!r}: wanted such as https://app.example.org, or *")
    return value


def _address(_context: click.Context, _parameter: click.Parameter, value: tuple[str, ...]) -> Any:
    for address in value:
        try:
            ipaddress.ip_network(address)
        except ValueError:
            raise click.BadParameter(
                f"{address!r}: wanted such as 10.0.0.7 or 10.0.0.0/8"
            ) from None
    return value


def _no_password(context: click.Context, parameter: click.Parameter, value: str | None) -> Any:
    on_line = context.get_parameter_source(parameter.name or "") is ParameterSource.COMMANDLINE
    try:
        place = urlsplit(value or "")
    except ValueError as error:
        raise click.BadParameter(f"no URL ({error}): wanted redis://host:port") from None
    if on_line and (place.password or "password" in parse_qs(place.query)):
        raise click.BadParameter(
            "a password on the command line is seen by everybody on this machine: give the URL in "
            f"the variable {parameter.envvar}"
        )
    return value


_TRITON, _LISTEN, _LIMITS = "Triton", "Where it listens", "Limits"
_WHO, _TOKENS, _RATES = "Who may ask", "Tokens of an OAuth 2 issuer (JWT)", "Rates"
_FILE = click.Path(path_type=Path, dir_okay=False)


@click.command(cls=Topics, part="gateway", epilog=_EPILOG)
@_option(
    _TRITON,
    "--url",
    envvar="ARROWHEAD_URL",
    default=DEFAULT_URL,
    help="Triton: grpc://host:port or http://host:port.",
)
@_option(_TRITON, "--model", default="minilm", help="The model's name there.")
@_option(
    _TRITON,
    "--cache",
    "entries",
    type=click.IntRange(1),
    default=ENTRIES,
    help="Texts whose vectors are remembered.",
)
@_option(_LISTEN, "--host", default=LOOPBACK, help="Address to listen on.")
@_option(_LISTEN, "--port", type=click.IntRange(1, 65535), default=8080)
@_option(
    _LISTEN,
    "--drain",
    "drain_s",
    type=click.FloatRange(min=0),
    default=0.0,
    envvar="ARROWHEAD_DRAIN",
    metavar="SECONDS",
    help="How long to answer on after a first SIGTERM, while /ready says no: longer than a "
    "balancer needs to notice. A second one ends that.",
)
@logs.option(cls=Topic, topic=_LISTEN)
@_option(_LISTEN, "--tls-cert", type=_FILE, help="Certificate chain, PEM: HTTPS instead of HTTP.")
@_option(_LISTEN, "--tls-key", type=_FILE, help="Its private key, PEM; closed to others.")
@_option(
    _LISTEN,
    "--proxy",
    multiple=True,
    metavar="ADDRESS",
    callback=_address,
    help="A proxy in front, or a network of such, whose X-Forwarded-For is believed. May be "
    "repeated.",
)
@_option(
    _LISTEN,
    "--cors-origin",
    "cors_origins",
    multiple=True,
    callback=_origin,
    help="A website whose pages may ask, such as https://app.example.org. May be repeated; none "
    "may unless it is named.",
)
@_option(
    _WHO,
    "--keys",
    "keys_file",
    type=_FILE,
    help="File of hashed API keys, from `arrowhead gateway-key`; closed to others, and read again "
    f"when it changes. Lines may also stand in {KEYS_VARIABLE}.",
)
@_option(
    _WHO,
    "--open",
    is_flag=True,
    help="Let anybody ask. Without it, no other address than loopback's is listened on unless keys "
    "or tokens are wanted.",
)
@_option(_TOKENS, "--jwt-issuer", "issuer", metavar="URL", help="Whose tokens are let in (iss).")
@_option(_TOKENS, "--jwt-audience", "audience", metavar="NAME", help="Whom they must be for (aud).")
@_option(
    _TOKENS,
    "--jwks",
    metavar="URL|FILE",
    help="The issuer's public keys: an https URL, fetched again when a new key is used; or a file.",
)
@_option(
    _TOKENS, "--scope", "scopes", multiple=True, help="That tokens must have. May be repeated."
)
@_option(
    _RATES,
    "--rate",
    metavar="N/UNIT",
    help="Requests of each caller, such as 100/second or 5000/hour; more are answered with 429. A "
    "caller is a key's name, a token's subject, or an address.",
)
@_option(
    _RATES,
    "--rate-store",
    envvar="ARROWHEAD_RATE_STORE",
    metavar="URL",
    callback=_no_password,
    help="redis://host:port, where several gateways count together. While it is away, each counts "
    "for itself.",
)
@_option(
    _LIMITS,
    "--max-texts",
    "most_texts",
    type=click.IntRange(1),
    default=MOST_TEXTS,
    help=f"Texts a request may hold; more are answered with 413 (TEI) or 400 (OpenAI). Triton is "
    f"asked in parts of at most {PART_TEXTS}, whatever this is.",
)
@_option(
    _LIMITS,
    "--max-text-chars",
    "most_characters",
    type=click.IntRange(1),
    default=MOST_CHARACTERS,
    help="Characters of a text; more are answered with 413 or 400.",
)
@_option(
    _LIMITS,
    "--max-body-mb",
    "most_body_mb",
    type=click.FloatRange(min=0, min_open=True),
    default=MOST_BODY_MB,
    help="Of a request's body; more is answered with 413.",
)
@_option(
    _LIMITS,
    "--in-flight",
    type=click.IntRange(1),
    default=IN_FLIGHT,
    help="Requests under way at once; more are answered with 429.",
)
@_option(
    _LIMITS,
    "--max-memory-mb",
    "most_memory_mb",
    type=click.FloatRange(min=0, min_open=True),
    default=MOST_MEMORY_MB,
    help="That requests under way may need together; more are answered with 429.",
)
def gateway(
    url: str,
    model: str,
    host: str,
    port: int,
    tls_cert: Path | None,
    tls_key: Path | None,
    proxy: tuple[str, ...],
    open: bool,  # noqa: A002 (the option's name)
    issuer: str | None,
    audience: str | None,
    jwks: str | None,
    scopes: tuple[str, ...],
    drain_s: float,
    log_format: logs.Format,
    **rest: Any,
) -> None:
    """Serve JSON over HTTP in front of Triton: TEI's and OpenAI's routes.

    On this machine only, unless --host says otherwise. It needs a running `arrowhead serve`.
    /health, /ready, /metrics and the pages at / and /docs ask nobody for a key.
    """
    logs.configure(log_format, "gateway", logging.WARNING)
    for handler in logging.getLogger().handlers:
        handler.addFilter(with_request_id)
    logging.getLogger("arrowhead_server").setLevel(logging.INFO)
    if log_format == "json":
        EVENTS.setLevel(logging.INFO)
    with logs.told_in(log_format):
        _tracing.start("arrowhead-gateway")
        parse_url(url)  # a wrong one is told now, not at the first request
        settings = Settings(
            url,
            model,
            keys_text=os.environ.get(KEYS_VARIABLE) or None,
            tokens=_tokens(issuer, audience, jwks, scopes),
            **rest,
        )
        if settings.rate_store and not settings.rate:
            raise click.UsageError("--rate-store counts for --rate, which is not given")
        needed_mb = settings.most_texts * PER_TEXT / MB
        if needed_mb >= settings.most_memory_mb:
            raise click.UsageError(
                f"--max-texts {settings.most_texts} take about {needed_mb:.0f} MB of memory: "
                f"wanted more than that as --max-memory-mb, which is {settings.most_memory_mb:g}"
            )
        _check_tls(tls_cert, tls_key)
        _check_open(settings, host, log_format, open=open, private=bool(tls_cert or proxy))
        app = create_app(settings)
        scheme = "http" if tls_cert is None else "https"
        place = f"{scheme}://{host}:{port}"
        EVENTS.info("starting", extra={"model": model, "triton": url, "url": place})
        if log_format == "text":
            click.echo(f"gateway for {model} at {url}: {place}/docs")
        config = uvicorn.Config(
            app,
            host=host,
            port=port,
            log_level="warning",
            log_config=None,  # as all else that is logged here
            access_log=False,
            server_header=False,
            http=CappedProtocol,
            ws="none",
            ssl_certfile=tls_cert,
            ssl_keyfile=tls_key,
            # Else whoever asks from this machine could take any address.
            proxy_headers=bool(proxy),
            forwarded_allow_ips=list(proxy),
            timeout_graceful_shutdown=math.ceil(settings.timeout_s),
        )
        server = DrainingServer(config, drain_s)
        server.run()
        if not server.started:
            raise SystemExit(1)  # uvicorn has said why


@click.command()
@click.argument("name")
@click.option(
    "--keys",
    type=_FILE,
    help="File that the key's hash is added to; made if there is none.",
)
def gateway_key(name: str, keys: Path | None) -> None:
    """Make an API key for NAME, and print it: the only time that it is seen.

    What a gateway keeps is a hash, from which nobody gets the key back. A name may have several
    keys, so one can take another's place: add the new one, change its user over, delete the old
    one's line. A running gateway follows the file.

    \b
    Examples:
      arrowhead gateway-key alice --keys gateway.keys
      arrowhead gateway --keys gateway.keys
      curl localhost:8080/embed -H "Authorization: Bearer $KEY" \\
          -H 'Content-Type: application/json' -d '{"inputs": "a text"}'
    """  # noqa: D301 (click reads the character)
    key = new()
    added = line(name, key)
    if keys is None:
        click.echo(f"# for a file of keys, or {KEYS_VARIABLE}:\n{added}\n# {name}'s key:\n{key}")
    else:
        add(keys, added)
        click.echo(f"{name}'s key, told this once; its hash is in {keys}:", err=True)
        click.echo(key)


def _tokens(
    issuer: str | None, audience: str | None, jwks: str | None, scopes: tuple[str, ...]
) -> TokenSettings | None:
    if issuer and audience and jwks:
        return TokenSettings(issuer, audience, jwks, scopes)
    if issuer or audience or jwks or scopes:
        raise click.UsageError("tokens need all of --jwt-issuer, --jwt-audience and --jwks")
    return None


def _check_tls(cert: Path | None, key: Path | None) -> None:
    if (cert is None) != (key is None):
        raise click.UsageError("TLS needs both --tls-cert and --tls-key")
    if cert is None or key is None:
        return
    check_private(key)
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(cert, key)
    except (OSError, ssl.SSLError) as error:
        raise BadSetting(f"no TLS with {cert} and {key}: {error}") from error


def _check_open(
    settings: Settings,
    host: str,
    log_format: logs.Format,
    *,
    open: bool,  # noqa: A002 (the option's name)
    private: bool,
) -> None:
    closed = bool(settings.keys_file or settings.keys_text or settings.tokens)
    if open and closed:
        raise click.UsageError("--open lets anybody ask, keys and tokens do not: choose")
    if _is_loopback(host):
        return
    if not closed and not open:
        raise click.UsageError(
            f"others reach --host {host}: wanted --keys FILE (`arrowhead gateway-key` makes one) "
            "or tokens (--jwt-issuer), or --open to let anybody ask"
        )
    if closed and not private:
        logs.warn(
            log_format,
            f"whoever sees the traffic to {host} reads the keys in it. Give --tls-cert, or put a "
            "proxy with TLS in front, named by --proxy.",
        )


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
