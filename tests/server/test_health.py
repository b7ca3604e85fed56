# SPDX-License-Identifier: Apache-2.0
"""What balancers are told in each state, and the end that they hear of before it comes."""

import http.client
import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from arrowhead_server import health
from arrowhead_server.address import Address, free_address
from arrowhead_server.rollout import Rollout, State
from arrowhead_server.supervisor import Server, running_server

from .conftest import pin, write_version

MakeRepository = Callable[..., Path]
Measured = Callable[..., None]
Serve = Callable[..., subprocess.Popen[str]]


def state(address: Address, tools: Any) -> tuple[int, str]:
    """Status of /ready and the state it tells; (0, "") where nobody answers."""
    try:
        status, body = tools.ask(address.health_port, "GET", "/ready")
    except (ConnectionError, http.client.HTTPException):
        return 0, ""
    return status, json.loads(body)["state"]


def series(server: Server, tools: Any) -> dict[str, float]:
    status, text = tools.ask(server.address.health_port, "GET", "/metrics")
    assert status == 200
    lines = [line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in lines}


@pytest.fixture
def resumed() -> Iterator[list[int]]:
    """Processes that a test stops, and that go on at its end whatever happens."""
    pids: list[int] = []
    yield pids
    for pid in pids:
        try:
            os.kill(pid, signal.SIGCONT)
        except ProcessLookupError:
            continue


def test_a_server_that_answers_is_ready(shared_server: Server, tools: Any) -> None:
    port = shared_server.address.health_port
    assert tools.ask(port, "GET", "/ready") == (200, '{"state": "ready"}')
    assert tools.ask(port, "GET", "/live") == (200, "{}")
    assert tools.ask(port, "HEAD", "/ready") == (200, "")
    status, body = tools.ask(port, "GET", "/elsewhere")
    assert (status, "wanted /live, /ready, /metrics" in body) == (404, True)
    assert tools.ask(port, "POST", "/ready", {})[0] == 501


def test_what_prometheus_reads(shared_server: Server, tools: Any) -> None:
    told = series(shared_server, tools)
    states = {name: value for name, value in told.items() if "server_state" in name}
    assert len(states) == 6
    assert [name for name, value in states.items() if value] == [
        'arrowhead_server_state{arrowhead_server_state="ready"}'
    ]
    assert told["arrowhead_server_restarts_total"] == 0
    assert told['arrowhead_server_model_info{dimension="8",model="toy",version="1"}'] == 1
    assert told["arrowhead_server_models"] == 1


def test_it_is_unready_while_it_starts_and_while_it_recovers(
    make_repository: MakeRepository, tools: Any
) -> None:
    address = free_address()
    seen: set[tuple[int, str]] = set()
    over = threading.Event()

    def look() -> None:
        while not over.is_set():
            seen.add(state(address, tools))

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        repository = make_repository(on_load="time.sleep(0.5)")
        with running_server(repository, address) as server:
            assert (503, "starting") in seen
            assert (503, "recovering") not in seen
            os.kill(server.pid, signal.SIGKILL)
            tools.wait_until(lambda: server.restarts, "the restart")
            tools.wait_until(lambda: state(address, tools) == (200, "ready"), "it to be ready")
            assert (503, "recovering") in seen
            assert series(server, tools)["arrowhead_server_restarts_total"] == 1
            assert series(server, tools)["arrowhead_server_recovery_seconds_total"] > 0.5
    finally:
        over.set()
        watcher.join()
    assert seen <= {
        (0, ""),
        (200, "ready"),
        *((503, name) for name in ("starting", "recovering", "hanging", "stopping")),
    }


def test_a_frozen_triton_is_unready_at_once(
    make_repository: MakeRepository, tools: Any, resumed: list[int], measured: Measured
) -> None:
    with running_server(make_repository()) as server:
        resumed.append(server.pid)
        began = time.monotonic()
        os.kill(server.pid, signal.SIGSTOP)  # its threads stop a moment later, one by one
        tools.wait_until(lambda: state(server.address, tools) == (503, "hanging"), "unreadiness")
        measured("unready after", time.monotonic() - began)
        assert time.monotonic() - began < 3
        assert tools.ask(server.address.health_port, "GET", "/live")[0] == 200
        os.kill(server.pid, signal.SIGCONT)
        tools.wait_until(lambda: state(server.address, tools)[0] == 200, "it to be ready again")
        assert server.restarts == []


def test_a_triton_that_stays_frozen_is_started_anew(
    make_repository: MakeRepository, tools: Any, resumed: list[int], measured: Measured
) -> None:
    with running_server(make_repository()) as server:
        resumed.append(server.pid)
        began = time.monotonic()
        os.kill(server.pid, signal.SIGSTOP)
        tools.wait_until(lambda: server.restarts, "the restart")
        tools.wait_until(lambda: state(server.address, tools)[0] == 200, "it to be ready again")
        measured("ready again after", time.monotonic() - began)
        assert server.restarts[0].reason == "Triton did not answer 3 times in a row within 3 s"


def test_a_frozen_model_is_unready_and_then_restarted(
    make_repository: MakeRepository, tools: Any, resumed: list[int], measured: Measured
) -> None:
    with running_server(make_repository()) as server:
        (stub,) = server.stub_pids()["toy_encoder"]
        resumed.append(stub)
        began = time.monotonic()
        os.kill(stub, signal.SIGSTOP)
        tools.wait_until(lambda: state(server.address, tools) == (503, "hanging"), "unreadiness")
        measured("unready after", time.monotonic() - began)
        reason = json.loads(tools.ask(server.address.health_port, "GET", "/ready")[1])["reason"]
        assert "the process of model 'toy_encoder' does not answer" in reason
        tools.wait_until(lambda: server.restarts, "the restart")
        tools.wait_until(lambda: state(server.address, tools)[0] == 200, "it to be ready again")
        measured("ready again after", time.monotonic() - began)
        assert time.monotonic() - began < 10


def test_a_model_that_hangs_is_unready_long_before_it_is_restarted(
    make_repository: MakeRepository, tools: Any, measured: Measured, tmp_path: Path
) -> None:
    hang = tmp_path / "hang"
    waiting = f"while os.path.exists({str(hang)!r}): time.sleep(0.01)"
    with running_server(make_repository(on_execute=waiting), probe_interval_s=0.2) as server:
        began = time.monotonic()
        hang.touch()
        tools.wait_until(lambda: state(server.address, tools) == (503, "hanging"), "unreadiness")
        measured("unready after", time.monotonic() - began)
        reason = json.loads(tools.ask(server.address.health_port, "GET", "/ready")[1])["reason"]
        assert "model 'toy_encoder' has answered nobody for" in reason
        hang.unlink()
        tools.wait_until(lambda: state(server.address, tools)[0] == 200, "it to be ready again")
        assert server.restarts == []


def test_a_busy_model_stays_ready(make_repository: MakeRepository, tools: Any) -> None:
    # A probe waits behind many requests for longer than a hanging model is given, while those are
    # answered one by one.
    slow = "time.sleep(0.25 * len(requests))"
    with running_server(make_repository(on_execute=slow), probe_interval_s=0.1) as server:
        over = threading.Event()

        def load(client: int) -> None:
            number = 0
            while not over.is_set():
                number += 1
                tools.embed(server.address, f"{client} {number}")

        threads = [threading.Thread(target=load, args=(client,)) for client in range(30)]
        for thread in threads:
            thread.start()
        try:
            deadline = time.monotonic() + 9
            while time.monotonic() < deadline:
                assert state(server.address, tools) == (200, "ready")
                time.sleep(0.1)
        finally:
            over.set()
            for thread in threads:
                thread.join()


def begin_drain(process: subprocess.Popen[str], address: Address, tools: Any) -> float:
    """Asks a server to stop once it is ready; when that was. Returns while it drains."""
    assert process.stdout is not None
    for _ in range(6):  # what it prints when it is ready
        process.stdout.readline()
    assert state(address, tools) == (200, "ready")
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    tools.wait_until(lambda: state(address, tools) == (503, "draining"), "the drain")
    return began


def test_it_answers_on_while_it_drains_and_then_ends(
    make_repository: MakeRepository, serve: Serve, tools: Any
) -> None:
    address = free_address()
    process = serve(make_repository(), address, "--drain", "2")
    began = begin_drain(process, address, tools)
    answered = 0
    while time.monotonic() - began < 1.8:
        answered += 1
        assert tools.embed(address, f"text {answered}")[0] == 200
    assert answered > 20
    assert process.wait(timeout=8) == 0
    assert time.monotonic() - began > 2
    assert state(address, tools) == (0, "")


def test_a_second_signal_ends_the_drain(
    make_repository: MakeRepository, serve: Serve, tools: Any
) -> None:
    address = free_address()
    process = serve(make_repository(), address, "--drain", "60")
    begin_drain(process, address, tools)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=8) == 0


def test_a_triton_that_dies_while_it_drains_is_not_started_anew(
    make_repository: MakeRepository, tools: Any
) -> None:
    server = Server(make_repository(), free_address(), drain_s=60)
    try:
        server.start()
        server.request_drain()
        tools.wait_until(lambda: state(server.address, tools) == (503, "draining"), "the drain")
        os.kill(server.pid, signal.SIGKILL)
        server.wait()
    finally:
        server.stop()
    assert server.restarts == []


def test_callers_that_send_nothing_hold_up_nobody(shared_server: Server, tools: Any) -> None:
    address = shared_server.address
    silent = [socket.create_connection(("127.0.0.1", address.health_port)) for _ in range(50)]
    try:
        began = time.monotonic()
        assert state(address, tools) == (200, "ready")
        assert time.monotonic() - began < 1
        silent[0].settimeout(10)
        assert silent[0].recv(1) == b""  # hung up on after five seconds
    finally:
        for connection in silent:
            connection.close()


def test_callers_that_send_a_byte_now_and_then_are_hung_up_on(
    shared_server: Server, tools: Any
) -> None:
    address = shared_server.address
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", address.health_port)) as slow, suppress(OSError):
        for letter in "GET /live?" + "a" * 30:  # twenty seconds of it
            slow.send(letter.encode())
            time.sleep(0.5)
    assert 9 < time.monotonic() - began < 14
    assert state(address, tools) == (200, "ready")


def test_who_comes_takes_the_place_of_who_has_taken_longest(
    shared_server: Server, tools: Any
) -> None:
    address = shared_server.address
    before = threading.active_count()
    lines = [socket.create_connection(("127.0.0.1", address.health_port)) for _ in range(300)]
    try:
        assert state(address, tools) == (200, "ready")
        tools.wait_until(lambda: threading.active_count() <= before + 64, "no more threads", 3)
        lines[0].settimeout(1)
        assert lines[0].recv(1) == b""
    finally:
        for line in lines:
            line.close()


def test_connections_are_kept_for_the_next_request(shared_server: Server) -> None:
    line = http.client.HTTPConnection("127.0.0.1", shared_server.address.health_port, timeout=5)
    for _ in range(6):  # longer together than any one may take
        line.request("GET", "/live")
        assert line.getresponse().read() == b"{}"
        used = line.sock
        time.sleep(2)
    assert line.sock is used
    line.close()


def test_it_is_not_alive_while_nobody_looks_after_triton(
    make_repository: MakeRepository, tools: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The supervising thread hangs in a system call, as on a disk that does not answer."""
    monkeypatch.setattr(health, "SILENT_S", 3.0)
    repository = make_repository()
    pin(repository, 1)
    over = threading.Event()
    apply = Rollout.apply

    def hanging(self: Rollout, state: State) -> None:
        if self.state.pairs:
            over.wait(30)
        apply(self, state)

    monkeypatch.setattr(Rollout, "apply", hanging)
    with running_server(repository) as server:

        def live() -> int:
            status, _ = tools.ask(server.address.health_port, "GET", "/live")
            return int(status)

        try:
            for _ in range(8):
                assert live() == 200
                time.sleep(0.5)
            write_version(repository, 2, "2 * ids.sum")
            pin(repository, 2)
            tools.wait_until(lambda: live() == 503, "silence")
            assert tools.embed(server.address, "a") == (200, 97.0)
        finally:
            over.set()
        tools.wait_until(lambda: live() == 200, "it goes on")
        tools.wait_until(lambda: tools.embed(server.address, "b")[1] == 2 * 98, "version 2")
