# SPDX-License-Identifier: Apache-2.0
"""`arrowhead mcp` against a real Triton, asked by the official client as hosts would."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
from click.testing import CliRunner
from mcp import Client, StdioServerParameters
from mcp.types import CallToolResult, TextContent

from arrowhead_client import Client as ArrowheadClient
from arrowhead_client.cli import main
from arrowhead_client.documents import Document, Index
from arrowhead_client.tools import definitions
from arrowhead_server.address import free_address
from arrowhead_server.supervisor import Server, running_server

from .conftest import wait_until

ARROWHEAD = str(Path(sys.executable).with_name("arrowhead"))
CALL = {"text": "a cat", "others": ["the stock market", "a kitten", "a tractor"]}


@pytest.fixture(scope="module")
def started(server: Server) -> Iterator[str]:
    """The URL of one that also answers to the name tools.example.org."""
    with _http(server, "--allow-host", "tools.example.org") as url:
        yield url


@contextmanager
def _http(server: Server, *options: str) -> Iterator[str]:
    port = free_address().http_port
    command = [ARROWHEAD, "mcp", "--transport=streamable-http", f"--port={port}", *options]
    process = subprocess.Popen([*command, f"--url={server.grpc_url}"])
    url = f"http://127.0.0.1:{port}/mcp"

    def answers() -> bool:
        assert process.poll() is None
        try:
            return httpx.post(url, json={}).status_code == 400
        except httpx.TransportError:
            return False

    try:
        wait_until(answers, "the MCP server")
        yield url
    finally:
        process.terminate()
        process.wait(20)


def _stdio(url: str, *options: str) -> StdioServerParameters:
    return StdioServerParameters(command=ARROWHEAD, args=["mcp", f"--url={url}", *options])


def _text(result: CallToolResult) -> str:
    (content,) = result.content
    assert isinstance(content, TextContent)
    return content.text


@pytest.mark.parametrize("mode", ["auto", "legacy"])
@pytest.mark.parametrize("transport", ["stdio", "streamable-http"])
async def test_a_host_finds_and_calls_the_tools(
    server: Server, started: str, transport: str, mode: str
) -> None:
    target: Any = _stdio(server.grpc_url) if transport == "stdio" else started
    async with Client(target, mode=mode) as host:
        assert host.server_info is not None
        assert host.server_info.name == "arrowhead"
        listed = {one.name: one for one in (await host.list_tools()).tools}
        for told in definitions("anthropic", ["embed", "similarity"]):
            one = listed.pop(told["name"])
            assert (one.description, one.input_schema) == (
                told["description"],
                told["input_schema"],
            )
            assert one.output_schema is not None
            jsonschema.Draft202012Validator.check_schema(one.output_schema)
        assert not listed  # no index, no search

        result = await host.call_tool("similarity", CALL)
        assert not result.is_error
        assert json.loads(_text(result)) == result.structured_content
        assert result.structured_content is not None
        ranked = [one["text"] for one in result.structured_content["matches"]]
        assert ranked[0] == "a kitten"

        many = {"texts": ["a text", "word " * 300] * 50, "encoding": "float32"}
        result = await host.call_tool("embed", many)
        assert result.structured_content is not None
        assert len(_text(result)) <= 4000
        first, second = result.structured_content["texts"][:2]
        assert (first["tokens"], first["truncated"]) == (4, False)
        assert (second["tokens"], second["truncated"]) == (256, True)
        assert "left out" in result.structured_content["note"]

        refused = await host.call_tool("similarity", {"text": "a cat"})
        assert refused.is_error
        assert "others is missing" in _text(refused)
        refused = await host.call_tool("search", {"query": "a cat"})
        assert refused.is_error
        assert "there are embed, similarity" in _text(refused)
        assert not (await host.call_tool("similarity", CALL)).is_error


@pytest.fixture(scope="module")
def notes(client: ArrowheadClient, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of four documents."""
    path = tmp_path_factory.mktemp("notes") / "notes.index"
    texts = {
        "tea": "Tea is made by pouring hot water over leaves.",
        "bread": "Bread rises because yeast makes gas.",
        "cats": "A kitten is a young cat.",
        "shares": "The stock market fell by a tenth.",
    }
    documents = (
        Document(name, text, {"year": 2020 + number})
        for number, (name, text) in enumerate(texts.items())
    )
    assert Index.create(path, client).add(documents) == 4
    return path


async def test_with_an_index_there_is_search(server: Server, notes: Path) -> None:
    async with Client(_stdio(server.grpc_url, f"--index={notes}")) as host:
        listed = {one.name: one for one in (await host.list_tools()).tools}
        assert list(listed) == ["embed", "similarity", "search"]
        result = await host.call_tool("search", {"query": "how is a hot drink prepared?"})
        assert result.structured_content is not None
        jsonschema.validate(result.structured_content, listed["search"].output_schema)
        best = result.structured_content["hits"][0]
        assert (best["id"], best["fields"]) == ("tea", {"year": 2020})
        where = {"query": "how is a hot drink prepared?", "where": "year > 2021", "limit": 1}
        result = await host.call_tool("search", where)
        assert result.structured_content is not None
        assert [one["fields"]["year"] > 2021 for one in result.structured_content["hits"]] == [True]
        refused = await host.call_tool("search", {**where, "where": "when > 2021"})
        assert refused.is_error
        assert "Fields: id (string), year (int64)" in _text(refused)


async def test_it_may_be_started_before_the_server(minilm_repository: Path, notes: Path) -> None:
    address = free_address()
    url = f"grpc://127.0.0.1:{address.grpc_port}"
    async with Client(_stdio(url, f"--index={notes}")) as host:
        for name, arguments in (("similarity", CALL), ("search", {"query": "tea"})):
            away = await host.call_tool(name, arguments)
            assert away.is_error
            assert f"no server answers at {url}" in _text(away)
            assert "`arrowhead serve` starts one" in _text(away)
        with running_server(minilm_repository, address):
            for name, arguments in (("similarity", CALL), ("search", {"query": "tea"})):
                assert not (await host.call_tool(name, arguments)).is_error


def test_stdout_is_the_protocols_alone(server: Server) -> None:
    """As a host that reads lines: each is a message, and the end of stdin ends the program."""
    hello = {
        "protocolVersion": "2025-06-18",
        "capabilities": {},
        "clientInfo": {"name": "t", "version": "0"},
    }
    messages: list[dict[str, Any]] = [
        {"id": 1, "method": "initialize", "params": hello},
        {"method": "notifications/initialized"},
        {"id": 2, "method": "tools/call", "params": {"name": "similarity", "arguments": CALL}},
    ]
    lines = "".join(json.dumps({"jsonrpc": "2.0", **one}) + "\n" for one in messages)
    process = subprocess.Popen(
        [ARROWHEAD, "mcp", f"--url={server.grpc_url}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(lines)
    process.stdin.flush()
    answers = [json.loads(process.stdout.readline()) for _ in range(2)]
    rest, errors = process.communicate(timeout=20)
    assert [answer["id"] for answer in answers] == [1, 2]
    assert answers[1]["result"]["structuredContent"]["compared"] == 3
    assert (process.returncode, rest, errors) == (0, "", "")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "localhost:9"}, 200),
        ({"Host": "tools.example.org"}, 200),
        ({"Host": "tools.example.org:8443", "Origin": "https://tools.example.org"}, 200),
        ({"Host": "rebound.example.org"}, 421),
        ({"Host": "tools.example.org.evil.example"}, 421),
        ({"Origin": "https://evil.example"}, 403),
        ({"Content-Type": "text/plain"}, 400),
    ],
)
def test_a_page_that_points_its_name_here_is_refused(
    started: str, headers: dict[str, str], status: int
) -> None:
    message = {"jsonrpc": "2.0", "id": 1, "method": "tools/list", "params": {}}
    accept = {"Accept": "application/json, text/event-stream", "Content-Type": "application/json"}
    answer = httpx.post(started, content=json.dumps(message), headers={**accept, **headers})
    assert answer.status_code == status, answer.text
    if status == 200:
        assert len(answer.json()["result"]["tools"]) == 2


@pytest.mark.parametrize(
    ("body", "status"), [(b"[" * 100_000, 400), (b'"' + b"a" * 5 * 2**20 + b'"', 413)]
)
def test_a_hostile_body_is_refused(started: str, body: bytes, status: int) -> None:
    accept = {"Accept": "application/json, text/event-stream", "Content-Type": "application/json"}
    assert httpx.post(started, content=body, headers=accept).status_code == status


def test_without_a_name_allowed_only_loopbacks_are(
    server: Server, capfd: pytest.CaptureFixture[str]
) -> None:
    listen = {"Accept": "text/event-stream"}
    with ExitStack() as stack, _http(server, "--host=0.0.0.0", "--open") as url:
        rebound = httpx.post(url, json={}, headers={"Host": "tools.example.org"})
        assert rebound.status_code == 421
        assert "loopback's names are answered: see --allow-host" in capfd.readouterr().err
        assert httpx.post(url, json={}).status_code == 400  # let in, but no message
        # Somebody who listens does not keep it from stopping.
        stream = stack.enter_context(httpx.stream("GET", url, headers=listen))
        assert stream.status_code == 200


def test_the_loopback_of_ipv6_is_loopback_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Told as a URL that can be used; nothing listens, for not every machine has IPv6."""
    listening: list[dict[str, Any]] = []
    monkeypatch.setattr("uvicorn.run", lambda app, **options: listening.append(options))
    result = CliRunner().invoke(
        main, ["mcp", "--transport=streamable-http", "--host=::1", "--port=8091"]
    )
    assert (result.exit_code, listening[0]["host"]) == (0, "::1")
    assert "http://[::1]:8091/mcp" in result.stderr
    assert "--allow-host" not in result.stderr


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (["--allow-host", "https://a.example"], "'https://a.example': wanted a name"),
        (["--url", "ftp://a"], "ftp"),
        (["--max-chars", "10"], "10 is not in the range"),
        (["--transport", "streamable-http", "--host", "0.0.0.0"], "know no keys"),  # noqa: S104
        (["--transport", "streamable-http", "--host", "::"], "say --open"),
        (["--index", "nowhere"], "nowhere holds no index: `arrowhead index build` makes one"),
    ],
)
def test_bad_options_are_told_at_the_start(options: list[str], wanted: str) -> None:
    result = CliRunner().invoke(main, ["mcp", *options])
    assert result.exit_code in (1, 2)
    assert wanted in result.stderr
    assert result.stdout == ""
