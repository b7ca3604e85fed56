# SPDX-License-Identifier: Apache-2.0
"""`arrowhead mcp`: the tools for hosts that speak the Model Context Protocol.

    host ──stdio or HTTP──▶ the SDK's Server ──▶ Tools.run, in a thread ──▶ Client ──▶ Triton

Nothing is asked of Triton before a tool is called, so a host may start this first.
"""

from __future__ import annotations

import ipaddress
import re
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import click
import uvicorn
from mcp.server.lowlevel import Server
from mcp.server.stdio import stdio_server
from mcp.server.transport_security import TransportSecuritySettings
from mcp.types import (
    CallToolRequestParams,
    CallToolResult,
    ListToolsResult,
    PaginatedRequestParams,
    TextContent,
    Tool,
    ToolAnnotations,
)
from starlette.applications import Starlette

from arrowhead_client._client import Client
from arrowhead_client._errors import ArrowheadError
from arrowhead_client._store import Store
from arrowhead_client._tool_forms import FORMS
from arrowhead_client._tool_results import LEAST_CHARS, MOST_CHARS, as_json, told
from arrowhead_client.commands import RETRIES, url_option
from arrowhead_client.documents import Index
from arrowhead_client.tools import Tools

_GRACE_S = 3  # for calls under way; a host that only listens would hold it for ever
_LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
_INSTRUCTIONS = (
    "Meaning of texts, by an embedding model: rank texts with `similarity`, find documents with "
    "`search` where it is offered."
)
_EPILOG = """\b
Examples:
  arrowhead mcp
  arrowhead mcp --index notes.index
  arrowhead mcp --transport streamable-http --port 8090

\b
In the JSON of a host that starts it:
  {"mcpServers": {"arrowhead": {"command": "arrowhead", "args": ["mcp"]}}}
"""
_HOST = re.compile(r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:\d+)?")


def create_server(tools: Tools) -> Server[Any]:
    """The tools as an MCP server, to run on any of the SDK's transports."""
    listed = [_listed(name) for name in tools.names]

    async def list_tools(context: object, params: PaginatedRequestParams | None) -> ListToolsResult:
        return ListToolsResult(tools=listed)

    async def call_tool(context: object, params: CallToolRequestParams) -> CallToolResult:
        run = partial(tools.run, params.name, params.arguments or {})
        try:
            # In a thread of its own; one whose caller has left may end when it likes.
            result = await anyio.to_thread.run_sync(run, abandon_on_cancel=True)
        except ArrowheadError as error:
            return CallToolResult(content=[_text(told(error))], is_error=True)
        return CallToolResult(content=[_text(as_json(result))], structured_content=result)

    return Server(
        "arrowhead",
        version=version("arrowhead"),
        instructions=_INSTRUCTIONS,
        on_list_tools=list_tools,
        on_call_tool=call_tool,
    )


def http_app(server: Server[Any], allow_hosts: tuple[str, ...] = ()) -> Starlette:
    """The server as an ASGI application at `/mcp`: streamable HTTP without sessions.

    Args:
        server: from `create_server`.
        allow_hosts: names besides loopback's that a request's Host and Origin may have, with a
            port or for every port. A page that had its own name point here is refused.
    """
    hosts = [one for host in (*_LOOPBACK, *allow_hosts) for one in _ports(host)]
    return server.streamable_http_app(
        json_response=True,
        stateless_http=True,
        transport_security=TransportSecuritySettings(
            allowed_hosts=hosts,
            allowed_origins=[
                f"{scheme}://{host}" for host in hosts for scheme in ("http", "https")
            ],
        ),
    )


def _checked_hosts(
    context: click.Context, parameter: click.Parameter, hosts: tuple[str, ...]
) -> tuple[str, ...]:
    for host in hosts:
        if not _HOST.fullmatch(host):
            raise click.BadParameter(
                f"{host!r}: wanted a name, such as tools.example.org or n:8443"
            )
    return hosts


@click.command(epilog=_EPILOG)
@url_option
@click.option("--model", help="The model's name.  [default: the index's, or minilm]")
@click.option(
    "--index",
    "path",
    type=click.Path(file_okay=False, path_type=Path),
    help="Offer `search` too, in the index in this folder; `arrowhead index` makes one.",
)
@click.option(
    "--transport",
    type=click.Choice(["stdio", "streamable-http"]),
    default="stdio",
    show_default=True,
    help="How hosts reach it: as a program that they start, or at http://HOST:PORT/mcp.",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="HTTP: address to listen on.")
@click.option("--port", type=click.IntRange(1, 65535), default=8090, show_default=True)
@click.option(
    "--open",
    "opened",
    is_flag=True,
    help="HTTP: listen beyond this machine, for every program that reaches it: there are no keys.",
)
@click.option(
    "--allow-host",
    "allow_hosts",
    metavar="NAME[:PORT]",
    multiple=True,
    callback=_checked_hosts,
    help="HTTP: answer requests to this name too, not only to loopback's. May be given again.",
)
@click.option(
    "--max-chars",
    type=click.IntRange(LEAST_CHARS),
    default=MOST_CHARS,
    show_default=True,
    help="Most characters of a tool's answer.",
)
def mcp(
    url: str,
    model: str | None,
    path: Path | None,
    transport: str,
    host: str,
    port: int,
    opened: bool,
    allow_hosts: tuple[str, ...],
    max_chars: int,
) -> None:
    """Offer embed, similarity and search to hosts of language models, by MCP.

    It asks a running `arrowhead serve`, and may be started before it. Over HTTP it listens on this
    machine only and knows no keys: for others, put a proxy that does in front.
    """
    beyond = transport != "stdio" and not _is_loopback(host)
    if beyond and not opened:
        raise click.UsageError(
            f"--host {host} is beyond this machine, and these tools know no keys: any program that "
            "reaches the port may use them (--allow-host stops web pages only). Put a proxy that "
            "knows keys in front of 127.0.0.1, or say --open"
        )
    store = None if path is None else Store.open(path)
    model = model or ("minilm" if store is None else store.description.model)
    with Client(url, model=model, retries=RETRIES) as client:
        index = None if store is None else Index(store, client)  # asks nothing yet
        server = create_server(Tools(client, index, most_chars=max_chars))
        if transport == "stdio":
            anyio.run(_serve_stdio, server)
            return
        click.echo(f"tools of {model} at {url}: {_url(host, port)}", err=True)
        if beyond and not allow_hosts:
            click.echo("only requests to loopback's names are answered: see --allow-host", err=True)
        app = http_app(server, allow_hosts)
        uvicorn.run(
            app,
            host=host,
            port=port,
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=_GRACE_S,
        )


async def _serve_stdio(server: Server[Any]) -> None:
    async with stdio_server() as (read, write):  # what else is printed goes to stderr meanwhile
        await server.run(read, write, server.create_initialization_options())


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _url(host: str, port: int) -> str:
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/mcp"


def _ports(host: str) -> list[str]:
    """What a Host header may be, for a host that was given with its port, or without any."""
    return [host] if re.search(r":\d+$", host) else [host, f"{host}:*"]


def _listed(name: str) -> Tool:
    form = FORMS[name]
    return Tool(
        name=name,
        description=form.description,
        input_schema=form.schema(),
        output_schema=form.result_schema(),
        annotations=ToolAnnotations(read_only_hint=True, open_world_hint=False),
    )


def _text(text: str) -> TextContent:
    return TextContent(type="text", text=text)
