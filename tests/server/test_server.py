# SPDX-License-Identifier: Apache-2.0
"""The real embedded Triton, with a toy model: answers, closed doors, deaths and recoveries."""

import os
import signal
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import tritonclient.grpc as triton_grpc
from tritonclient.utils import InferenceServerException

from arrowhead_server import supervisor
from arrowhead_server.address import free_address
from arrowhead_server.errors import CrashLoopError, PortInUseError, StartError
from arrowhead_server.probe import FAILURES_IN_A_ROW, Pulse
from arrowhead_server.supervisor import Server, running_server

MakeRepository = Callable[..., Path]
Measured = Callable[..., None]


@contextmanager
def under_load(server: Server, tools: Any, clients: int = 4) -> Iterator[Counter[str]]:
    """Clients that never stop asking; counts what they got: ok, wrong, no connection, an error."""
    counts: Counter[str] = Counter()
    over = threading.Event()

    def ask(client: int) -> None:
        number = 0
        while not over.is_set():
            number += 1
            text = f"{client} {number}"  # a new one each time: no help from the cache
            try:
                status, answer = tools.embed(server.address, text)
            except ConnectionError:
                counts["no connection"] += 1
                continue
            if status == 200:
                counts["ok" if answer == sum(text.encode()) else "wrong"] += 1
            else:
                counts[f"{status} {answer[:60]}"] += 1

    threads = [threading.Thread(target=ask, args=(client,)) for client in range(clients)]
    for thread in threads:
        thread.start()
    try:
        tools.wait_until(lambda: counts["ok"] > 5, "the load to flow")
        yield counts
    finally:
        over.set()
        for thread in threads:
            thread.join()


def recovers(server: Server, tools: Any, counts: Counter[str]) -> float:
    """Waits for one more restart and for answers after it; returns its seconds."""
    tools.wait_until(lambda: server.restarts, "a restart")
    answered = counts["ok"]
    tools.wait_until(lambda: counts["ok"] > answered + 20, "answers after the restart")
    assert counts["wrong"] == 0
    assert tools.embed(server.address, "abc") == (200, sum(b"abc"))
    return server.restarts[-1].recovery_s


# --- answers ---------------------------------------------------------------------------------


def test_it_answers(shared_server: Server, tools: Any) -> None:
    assert tools.embed(shared_server.address, "abc") == (200, sum(b"abc"))
    assert tools.embed(shared_server.address, "abc") == (200, sum(b"abc"))  # from the cache
    assert 0 < shared_server.ready_s < 60
    stubs = shared_server.stub_pids()
    assert {name: len(pids) for name, pids in stubs.items()} == {
        "toy_tokenizer": 1,
        "toy_encoder": 1,
    }


def test_it_answers_over_grpc(shared_server: Server) -> None:
    text = triton_grpc.InferInput("text", [2, 1], "BYTES")
    text.set_data_from_numpy(np.array([[b"a"], [b"bc"]], np.object_))
    with triton_grpc.InferenceServerClient(shared_server.grpc_url.removeprefix("grpc://")) as grpc:
        vectors = grpc.infer("toy", [text]).as_numpy("embeddings")
    assert vectors[:, 0].tolist() == [ord("a"), ord("b") + ord("c")]


def test_metrics_count_the_cache(shared_server: Server, tools: Any) -> None:
    for _ in range(2):
        tools.embed(shared_server.address, "twice")
    status, text = tools.ask(shared_server.address.metrics_port, "GET", "/metrics")
    assert status == 200
    hits = [line for line in text.splitlines() if line.startswith("nv_cache_num_hits_per_model")]
    assert any('model="toy"' in line and float(line.split()[-1]) >= 1 for line in hits)


def test_listens_on_loopback_only(shared_server: Server) -> None:
    listening = [
        connection.laddr
        for connection in psutil.Process(shared_server.pid).net_connections()
        if connection.status == psutil.CONN_LISTEN
    ]
    address = shared_server.address
    assert {port for _, port in listening} == {
        address.http_port,
        address.grpc_port,
        address.metrics_port,
    }
    # gRPC listens on an IPv6 socket, for IPv4.
    assert {ip.removeprefix("::ffff:") for ip, _ in listening} == {"127.0.0.1"}


# --- closed doors ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/v2/repository/index", {}),
        ("POST", "/v2/repository/models/toy/load", {}),
        ("POST", "/v2/repository/models/toy/unload", {}),
        ("POST", "/v2/systemsharedmemory/region/x/register", {"key": "/x", "byte_size": 8}),
        ("GET", "/v2/systemsharedmemory/status", None),
        ("GET", "/v2/cudasharedmemory/status", None),
        ("POST", "/v2/logging", {"log_verbose_level": 9}),
        ("POST", "/v2/trace/setting", {"trace_level": ["TENSORS"]}),
        ("POST", "/v2/models/toy/trace/setting", {"trace_level": ["TENSORS"]}),
    ],
)
def test_admin_apis_are_closed_over_http(
    shared_server: Server, tools: Any, method: str, path: str, body: Any
) -> None:
    port = shared_server.address.http_port
    # What a user of this machine can read from argv, up to the line feed no header can hold.
    argv = Path(f"/proc/{shared_server.pid}/cmdline").read_text().split("\0")
    name, value = next(
        argument.split(":", 1)[1].split("=", 1)
        for argument in argv
        if argument.startswith("--http-restricted-api")
    )
    assert "\n" in value
    for headers in ({}, {name: value.split("\n")[0]}):
        status, answer = tools.ask(port, method, path, body, **headers)
        assert status == 403
        assert "restricted" in answer
    assert tools.embed(shared_server.address, "still here")[0] == 200


@pytest.mark.parametrize(
    "call",
    [
        lambda grpc: grpc.get_model_repository_index(),
        lambda grpc: grpc.load_model("toy"),
        lambda grpc: grpc.unload_model("toy"),
        lambda grpc: grpc.register_system_shared_memory("x", "/x", 8),
        lambda grpc: grpc.get_cuda_shared_memory_status(),
        lambda grpc: grpc.update_log_settings({"log_verbose_level": 9}),
        lambda grpc: grpc.update_trace_settings(settings={"trace_level": ["TENSORS"]}),
    ],
)
def test_admin_apis_are_closed_over_grpc(shared_server: Server, call: Callable[[Any], Any]) -> None:
    with (
        triton_grpc.InferenceServerClient(shared_server.grpc_url.removeprefix("grpc://")) as grpc,
        pytest.raises(InferenceServerException, match="restricted"),
    ):
        call(grpc)


# --- failed starts ---------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["http_port", "grpc_port", "metrics_port", "health_port"])
def test_a_taken_port_is_named_with_its_option(
    make_repository: MakeRepository, option: str
) -> None:
    address = free_address()
    with socket.socket() as squatter:
        squatter.bind(("127.0.0.1", getattr(address, option)))
        squatter.listen()
        flag = option.replace("_", "-")
        with (
            pytest.raises(PortInUseError, match=rf"{squatter.getsockname()[1]}.*--{flag}"),
            running_server(make_repository(), address),
        ):
            pass


def test_a_model_that_cannot_load_is_named_with_its_reason(
    make_repository: MakeRepository,
) -> None:
    repository = make_repository(on_load='raise RuntimeError("no weights here")')
    with (
        pytest.raises(StartError) as caught,
        running_server(repository),
    ):
        pass
    assert str(caught.value) == "model 'toy_encoder' failed to load: RuntimeError: no weights here"


def test_a_model_that_loads_but_cannot_answer_is_not_ready(
    make_repository: MakeRepository,
) -> None:
    repository = make_repository(on_execute='raise RuntimeError("not today")')
    with (
        pytest.raises(StartError, match=r"'toy_encoder' is loaded but does not answer.*not today"),
        running_server(repository),
    ):
        pass


def test_a_model_that_dies_at_its_first_inference(make_repository: MakeRepository) -> None:
    repository = make_repository(on_execute="os._exit(3)")
    with (
        pytest.raises(StartError, match="'toy_encoder'"),
        running_server(repository),
    ):
        pass


def test_a_broken_config_is_reported(make_repository: MakeRepository) -> None:
    repository = make_repository()
    config = repository / "toy_encoder" / "config.pbtxt"
    config.write_text(config.read_text().replace("TYPE_FP32", "TYPE_FOO"))
    with pytest.raises(StartError, match="TYPE_FOO"), running_server(repository):
        pass


# --- deaths and recoveries -------------------------------------------------------------------


@pytest.mark.parametrize("model", ["toy_encoder", "toy_tokenizer"])
def test_a_killed_stub_under_load(
    make_repository: MakeRepository, tools: Any, measured: Measured, model: str
) -> None:
    with running_server(make_repository()) as server, under_load(server, tools) as counts:
        os.kill(server.stub_pids()[model][0], signal.SIGKILL)
        recovery_s = recovers(server, tools, counts)
        assert f"'{model}'" in server.restarts[0].reason
        assert len(tools.shared_memory(server.shm_prefix)) == 2  # of the new stubs
        measured("recovery", recovery_s)
        # Cut connections while nobody listens; never a wrong vector, never a strange answer.
        assert set(counts) <= {"ok", "no connection"}
    assert recovery_s < 30
    assert len(server.restarts) == 1
    assert tools.shared_memory(server.shm_prefix) == []


def test_a_killed_triton_under_load(
    make_repository: MakeRepository, tools: Any, measured: Measured
) -> None:
    with running_server(make_repository()) as server, under_load(server, tools) as counts:
        old = server.pid
        os.kill(old, signal.SIGKILL)
        measured("recovery", recovers(server, tools, counts))
        assert server.restarts[0].reason == "tritonserver was killed by SIGKILL"
        assert server.pid != old


def test_a_stopped_stub_is_noticed_by_the_probe(
    make_repository: MakeRepository, tools: Any, measured: Measured
) -> None:
    with running_server(make_repository(), probe_interval_s=0.1, probe_timeout_s=0.5) as server:
        stub = server.stub_pids()["toy_encoder"][0]
        os.kill(stub, signal.SIGSTOP)
        tools.wait_until(lambda: server.restarts, "a restart")
        restart = server.restarts[0]
        assert restart.reason == (
            "model 'toy_encoder' failed 3 probes in a row: no answer within 0.5 s"
        )
        assert not tools.is_alive(stub)
        assert tools.embed(server.address, "abc") == (200, sum(b"abc"))
        measured("recovery", restart.recovery_s)


def test_a_busy_model_is_left_alone(
    make_repository: MakeRepository, tools: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    late: list[str] = []
    ask = Pulse.failures

    def ask_and_count(pulse: Pulse) -> dict[str, str]:
        failed = ask(pulse)
        late.extend(failed)
        return failed

    monkeypatch.setattr(Pulse, "failures", ask_and_count)
    # Eight clients wait for 0.1 s each, one after the other: no probe is answered within 0.3 s.
    repository = make_repository(on_execute="time.sleep(0.1)")
    with (
        running_server(repository, probe_interval_s=0.05, probe_timeout_s=0.3) as server,
        under_load(server, tools, clients=8) as counts,
    ):
        tools.wait_until(lambda: len(late) >= 2 * FAILURES_IN_A_ROW, "late probes")
        assert server.restarts == []
    assert set(late) == {("toy_encoder", 1)}
    assert set(counts) == {"ok"}


def test_it_gives_up_on_a_server_that_does_not_come_back(
    make_repository: MakeRepository, tools: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "FIRST_DELAY_S", 0.01)
    broken = tmp_path / "broken"
    repository = make_repository(
        on_load=f"if os.path.exists({str(broken)!r}):\n    raise RuntimeError('gone for good')"
    )
    with (  # noqa: PT012
        pytest.raises(CrashLoopError, match=r"5 failed starts in a row: .*gone for good"),
        running_server(repository) as server,
    ):
        broken.touch()
        os.kill(server.stub_pids()["toy_encoder"][0], signal.SIGKILL)
        server.wait()
    assert tools.shared_memory(server.shm_prefix) == []


# --- ends ------------------------------------------------------------------------------------


def test_two_servers_side_by_side(
    make_repository: MakeRepository, tools: Any, shared_server: Server
) -> None:
    with running_server(make_repository()) as server:
        assert tools.embed(server.address, "a") == (200, ord("a"))
        pids = [server.pid, *chain.from_iterable(server.stub_pids().values())]
    assert not any(map(tools.is_alive, pids))
    assert tools.shared_memory(server.shm_prefix) == []
    # The other one still has all of its own.
    assert len(tools.shared_memory(shared_server.shm_prefix)) == 2
    assert tools.embed(shared_server.address, "b") == (200, ord("b"))


def test_a_stop_before_it_is_ready(make_repository: MakeRepository, tools: Any) -> None:
    server = Server(make_repository(on_load="time.sleep(60)"), free_address())

    def stop_early() -> None:
        tools.wait_until(lambda: server.pid, "a process")
        server.request_stop()

    stopper = threading.Thread(target=stop_early)
    stopper.start()
    assert server.start() is False
    server.stop()
    stopper.join()
    assert tools.shared_memory(server.shm_prefix) == []
