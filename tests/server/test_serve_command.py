# SPDX-License-Identifier: Apache-2.0
"""`arrowhead serve` as its users meet it: a process that gets signals, and what is left of it."""

import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from click.testing import CliRunner

from arrowhead_server.address import Address, free_address
from arrowhead_server.command import serve as serve_command

MakeRepository = Callable[..., Path]
Measured = Callable[..., None]
Serve = Callable[..., subprocess.Popen[str]]

READY = re.compile(
    r"ready in \d+\.\d s\n"
    r"  models   toy \(8\)\n"
    r"  HTTP     http://127\.0\.0\.1:(\d+)\n"
    r"  gRPC     grpc://127\.0\.0\.1:(\d+)\n"
    r"  metrics  http://127\.0\.0\.1:(\d+)/metrics\n"
    r"  health   http://127\.0\.0\.1:(\d+)/ready\n"
)


def read_ready_lines(process: subprocess.Popen[str], address: Address) -> None:
    assert process.stdout is not None
    text = "".join(process.stdout.readline() for _ in range(6))
    found = READY.fullmatch(text)
    assert found, text
    assert found.groups() == tuple(
        str(port)
        for port in (
            address.http_port,
            address.grpc_port,
            address.metrics_port,
            address.health_port,
        )
    )


def family(process: subprocess.Popen[str]) -> list[int]:
    """Every process below `process`: janitor, tritonserver, stubs."""
    return [child.pid for child in psutil.Process(process.pid).children(recursive=True)]


def assert_nothing_is_left(
    process: subprocess.Popen[str], children: list[int], tmp_path: Path, tools: Any
) -> None:
    assert len(children) == 4
    assert not any(map(tools.is_alive, children))
    assert tools.shared_memory(f"arrowhead-{process.pid}-") == []
    assert list(tmp_path.glob("arrowhead-*")) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_it_within_five_seconds(
    make_repository: MakeRepository,
    serve: Serve,
    tools: Any,
    tmp_path: Path,
    measured: Measured,
    number: signal.Signals,
) -> None:
    address = free_address()
    process = serve(make_repository(), address)
    read_ready_lines(process, address)
    assert tools.embed(address, "abc") == (200, sum(b"abc"))
    children = family(process)
    assert tools.shared_memory(f"arrowhead-{process.pid}-")
    assert list(tmp_path.glob("arrowhead-*"))
    began = time.monotonic()
    process.send_signal(number)
    output, errors = process.communicate(timeout=5)
    measured("stop", time.monotonic() - began)
    assert (process.returncode, output, errors) == (0, "", "")
    assert_nothing_is_left(process, children, tmp_path, tools)


def test_an_open_connection_and_a_stopped_stub_do_not_hold_up_the_stop(
    make_repository: MakeRepository, serve: Serve, tools: Any, tmp_path: Path
) -> None:
    address = free_address()
    process = serve(make_repository(), address)
    read_ready_lines(process, address)
    children = family(process)
    for pid in children:
        if "stub" in psutil.Process(pid).name():
            os.kill(pid, signal.SIGSTOP)
    with socket.create_connection(("127.0.0.1", address.http_port)):
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=5)
    assert_nothing_is_left(process, children, tmp_path, tools)


def test_nothing_outlives_a_killed_supervisor(
    make_repository: MakeRepository, serve: Serve, tools: Any, tmp_path: Path, measured: Measured
) -> None:
    address = free_address()
    process = serve(make_repository(), address)
    read_ready_lines(process, address)
    children = family(process)
    # A stub that cannot notice by itself that its Triton is gone.
    for pid in children:
        if "stub" in psutil.Process(pid).name():
            os.kill(pid, signal.SIGSTOP)
    began = time.monotonic()
    process.kill()
    process.wait()
    tools.wait_until(
        lambda: (
            not any(map(tools.is_alive, children))
            and tools.shared_memory(f"arrowhead-{process.pid}-") == []
            and list(tmp_path.glob("arrowhead-*")) == []
        ),
        "everything to be gone",
        timeout_s=10,
    )
    measured("gone", time.monotonic() - began)
    assert_nothing_is_left(process, children, tmp_path, tools)


def test_a_restart_is_told_on_stderr(
    make_repository: MakeRepository, serve: Serve, tools: Any
) -> None:
    address = free_address()
    process = serve(make_repository(), address)
    read_ready_lines(process, address)
    os.kill(next(p for p in family(process) if "stub" in psutil.Process(p).name()), signal.SIGKILL)
    assert process.stderr is not None
    lines = [process.stderr.readline() for _ in range(2)]
    assert re.search(r"WARNING restarting Triton: the process of model 'toy_\w+' \(pid", lines[0])
    assert re.search(r"WARNING Triton answers again after \d+\.\d\d s", lines[1])
    assert tools.embed(address, "abc") == (200, sum(b"abc"))
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=5) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_load": "raise RuntimeError('no luck')"}, "'toy_encoder' failed to load: Runtime"),
        ({"weights": False}, "`arrowhead convert SOURCE --name toy` first"),
    ],
)
def test_a_failed_start_is_one_line_and_exit_code_one(
    make_repository: MakeRepository,
    serve: Serve,
    tmp_path: Path,
    options: dict[str, Any],
    message: str,
) -> None:
    process = serve(make_repository(**options), free_address())
    output, errors = process.communicate(timeout=30)
    assert (process.returncode, output) == (1, "")
    assert errors.startswith("arrowhead: ")
    assert message in errors
    assert errors.count("\n") == 1
    assert list(tmp_path.glob("arrowhead-*")) == []


def test_help_teaches_by_example() -> None:
    result = CliRunner().invoke(serve_command, ["--help"])
    assert result.exit_code == 0
    assert "arrowhead serve --repository /srv/models --http-port 9000" in result.output
    assert "ARROWHEAD_REPOSITORY" in result.output


def test_the_repository_comes_from_the_environment(tmp_path: Path) -> None:
    result = CliRunner().invoke(
        serve_command, [], env={"ARROWHEAD_REPOSITORY": str(tmp_path / "elsewhere")}
    )
    assert f"no model repository at {tmp_path / 'elsewhere'}" in str(result.exception)


def test_an_outside_address_is_warned_about(tmp_path: Path) -> None:
    arguments = ["--repository", str(tmp_path)]
    result = CliRunner().invoke(serve_command, [*arguments, "--host", "0.0.0.0"])  # noqa: S104
    assert "warning: listening on 0.0.0.0" in result.stderr
    assert "warning" not in CliRunner().invoke(serve_command, arguments).stderr


@pytest.mark.parametrize("host", ["example.org", "::1", ""])
def test_a_host_must_be_an_ipv4_address(host: str) -> None:
    result = CliRunner().invoke(serve_command, ["--host", host])
    assert result.exit_code == 2
    assert "is not an IPv4 address" in result.stderr
