# SPDX-License-Identifier: Apache-2.0
"""The stack: the configuration files of deploy/, run as plain processes."""

from __future__ import annotations

import contextlib
import gzip
import itertools
import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import psutil
import pytest
from tritonclient.grpc import InferenceServerClient, InferInput
from tritonclient.utils import InferenceServerException

from arrowhead_client import Client
from deploy.stack import Stack, StackError, free_prefix
from deploy.stack import stack as stack_module

from .conftest import successes_in, wait_until
from .stacks import NEEDED, need

ROOT = Path(__file__).parents[2]
INFER = "/v2/models/minilm/infer"
TEXT = {"name": "text", "shape": [1, 1], "datatype": "BYTES", "data": ["a text"]}
# Nests as deep as kills an embedded Triton, which answers 16,000 still.
DEEP = b'{"inputs":[{"name":"text","shape":[1,1],"datatype":"BYTES","data":%s}]}' % (
    b"[" * 100_000 + b"]" * 100_000
)
# Metrics that need a GPU.
GPU = {"nv_gpu_utilization", "nv_gpu_memory_used_bytes", "nv_gpu_memory_total_bytes"}


@pytest.mark.parametrize("road", ["grpc_url", "http_url"])
def test_through_haproxy_come_the_vectors_of_the_engine(
    stack: Stack, road: str, texts: list[str], wanted: npt.NDArray[np.float32]
) -> None:
    with Client(getattr(stack, road)) as client:
        got = client.embed(texts)
    assert (got * wanted).sum(axis=1).min() > 0.9999


def test_the_gateways_answer_through_haproxy(
    stack: Stack, texts: list[str], wanted: npt.NDArray[np.float32]
) -> None:
    answer = httpx.post(f"{stack.gateway_url}/embed", json={"inputs": texts, "truncate": True})
    assert answer.status_code == 200, answer.text
    assert (np.array(answer.json()) * wanted).sum(axis=1).min() > 0.9999


@pytest.mark.parametrize("road", ["grpc_url", "http_url"])
def test_requests_of_one_connection_go_to_all_replicas(stack: Stack, road: str) -> None:
    before = {name: successes_in(stack, name, "minilm") for name in stack.tritons}
    with Client(getattr(stack, road), batch_size=1) as client:
        client.embed([f"{road} number {number}" for number in range(60)])
    for name in stack.tritons:
        assert successes_in(stack, name, "minilm") - before[name] >= 5


# -- what HAProxy refuses by itself --


@pytest.mark.parametrize(
    ("method", "path", "headers", "body", "status"),
    [
        ("POST", INFER, {}, DEEP, 413),
        ("POST", INFER, {"Inference-Header-Content-Length": str(len(DEEP))}, DEEP, 400),
        ("POST", INFER, {"Inference-Header-Content-Length": "0"}, DEEP, 400),
        ("POST", INFER, {"Inference-Header-Content-Length": "+1"}, b"{}", 400),
        ("POST", INFER, {"Content-Encoding": "gzip"}, gzip.compress(DEEP), 415),
        ("POST", INFER, {"Inference-Header-Content-Length": "2"}, b"{}" + bytes(1 << 24), 413),
        ("GET", "/v2", {}, b"a body", 413),
        ("GET", "/v2", {"X-Long": "x" * 17_000}, b"", 431),
        ("GET", f"/v2?{'x' * 5_000}", {}, b"", 431),
        ("POST", "/v2/repository/index", {}, b"", 403),
        ("POST", "/v2/repository/models/minilm/unload", {}, b"", 403),
        ("GET", "/v2/systemsharedmemory/status", {}, b"", 403),
        ("POST", "/v2/systemsharedmemory/region/a/register", {}, b"{}", 403),
        ("GET", "/v2/cudasharedmemory/status", {}, b"", 403),
        ("GET", "/v2/trace/setting", {}, b"", 403),
        ("POST", "/v2/logging", {}, b"{}", 403),
        ("POST", "/v2/models/minilm/generate", {}, b"{}", 403),
        ("POST", "/v2/models/%2e%2e%2frepository/infer", {}, b"{}", 403),
        ("POST", "//v2/models/minilm/infer", {}, b"{}", 403),
        ("DELETE", INFER, {}, b"", 403),
    ],
)
def test_haproxy_refuses_over_http(
    stack: Stack, method: str, path: str, headers: dict[str, str], body: bytes, status: int
) -> None:
    with httpx.Client(base_url=stack.http_url) as client:
        answer = client.request(method, path, headers=headers, content=body)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]
    assert _untouched(stack)


@pytest.mark.parametrize("length", [2**32 + 100, 2**31 + 100])
def test_a_length_beyond_haproxys_numbers_is_refused(stack: Stack, length: int) -> None:
    host = stack.http_url.removeprefix("http://").partition(":")[0]
    with socket.create_connection((host, 8000), timeout=10) as connection:
        head = f"POST {INFER} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n"
        connection.sendall(head.encode())
        with contextlib.suppress(ConnectionError):
            connection.sendall(b" " * 300_000)
        assert connection.recv(1000).startswith(b"HTTP/1.1 413 ")
    assert _untouched(stack)


def test_a_grpc_message_of_more_than_16_mib_is_refused(stack: Stack) -> None:
    given = InferInput("text", [1, 1], "BYTES")
    given.set_data_from_numpy(np.array([["a" * (1 << 24)]], dtype=np.object_))
    with InferenceServerClient(stack.grpc_url.removeprefix("grpc://")) as client:
        with pytest.raises(InferenceServerException) as caught:
            client.infer("minilm", [given])
        assert caught.value.status() == "StatusCode.PERMISSION_DENIED"
        given.set_data_from_numpy(np.array([["a" * (1 << 20)]], dtype=np.object_))
        assert client.infer("minilm", [given]).as_numpy("embeddings").shape == (1, 384)
    assert _untouched(stack)


def test_strangers_connections_leave_room_for_those_inside(stack: Stack) -> None:
    host = stack.gateway_url.removeprefix("http://").partition(":")[0]
    with contextlib.ExitStack() as idle:
        for _ in range(1_250):
            idle.enter_context(socket.create_connection((host, 8080), timeout=10))
        assert httpx.get(f"{stack.haproxy_url}/ready", timeout=3).status_code == 200
        with Client(stack.grpc_url) as client:
            assert client.embed("a text").shape == (384,)


def test_a_body_in_chunks_is_refused_before_it_is_read(stack: Stack) -> None:
    def chunks() -> Iterator[bytes]:
        yield json.dumps({"inputs": [TEXT]}).encode()

    answer = httpx.post(f"{stack.http_url}{INFER}", content=chunks())
    assert answer.status_code == 411
    assert "Content-Length" in answer.json()["error"]


@pytest.mark.parametrize(
    "path", ["/v2", "/v2/health/ready", "/v2/models/minilm", "/v2/models/minilm/versions/1/config"]
)
def test_haproxy_lets_questions_in(stack: Stack, path: str) -> None:
    assert httpx.get(f"{stack.http_url}{path}").status_code == 200


def test_short_json_is_let_in(stack: Stack) -> None:
    answer = httpx.post(f"{stack.http_url}{INFER}", json={"inputs": [TEXT]})
    assert answer.status_code == 200
    assert len(answer.json()["outputs"][0]["data"]) == 384


def test_haproxy_refuses_over_grpc(stack: Stack) -> None:
    client = InferenceServerClient(stack.grpc_url.removeprefix("grpc://"))
    calls: list[tuple[Any, ...]] = [
        (client.get_model_repository_index,),
        (client.unload_model, "minilm"),
        (client.get_system_shared_memory_status,),
        (client.register_system_shared_memory, "a", "/a", 1),
        (client.get_cuda_shared_memory_status,),
        (client.get_trace_settings,),
        (client.update_log_settings, {"log_verbose_level": 1}),
    ]
    try:
        for call, *arguments in calls:
            with pytest.raises(InferenceServerException) as caught:
                call(*arguments)
            assert caught.value.status() == "StatusCode.PERMISSION_DENIED"
        # A few kilobytes that would be unpacked to megabytes.
        given = InferInput("text", [1, 1], "BYTES")
        given.set_data_from_numpy(np.array([["a" * 1_000_000]], dtype=np.object_))
        with pytest.raises(InferenceServerException) as caught:
            client.infer("minilm", [given], compression_algorithm="gzip")
        assert caught.value.status() == "StatusCode.PERMISSION_DENIED"
        assert client.is_model_ready("minilm")
        assert client.get_model_metadata("minilm").name == "minilm"
    finally:
        client.close()
    assert _untouched(stack)


def test_the_gateways_metrics_stay_inside(stack: Stack) -> None:
    for path in ("/metrics", "/%6detrics", "/metrics?a=b"):
        assert httpx.get(f"{stack.gateway_url}{path}").status_code == 403
    assert httpx.get(f"http://{stack.address('gateway1')}:8080/metrics").status_code == 200


def test_who_sends_too_slowly_is_sent_away(stack: Stack) -> None:
    """A byte now and then: of the headers, of the body."""
    host = stack.http_url.removeprefix("http://").split(":")[0]
    head = f"POST {INFER} HTTP/1.1\r\nHost: x\r\n"
    openings = [head, f"{head}Content-Length: 100\r\n\r\n"]
    connections = [socket.create_connection((host, 8000)) for _ in openings]
    try:
        for connection, opening in zip(connections, openings, strict=True):
            connection.sendall(opening.encode())
        for _ in range(8):
            time.sleep(0.5)
            for connection in connections:
                connection.sendall(b"x")
        for connection in connections:
            connection.settimeout(10)
            assert b" 408 " in connection.recv(1000).split(b"\r\n")[0]
    finally:
        for connection in connections:
            connection.close()


# -- ids and logs --


@pytest.mark.parametrize("url", ["gateway_url", "http_url"])
def test_a_request_keeps_its_id_or_gets_one(stack: Stack, url: str) -> None:
    at = f"{getattr(stack, url)}/v2/models/minilm/infer"
    body = {"inputs": [TEXT]}
    own = httpx.post(at, json=body, headers={"X-Request-Id": "my-own.id:1"})
    assert own.headers.get_list("X-Request-Id") == ["my-own.id:1"]
    for bad in ("with spaces in it", "x" * 200, "<b>"):
        made = httpx.post(at, json=body, headers={"X-Request-Id": bad}).headers["X-Request-Id"]
        assert re.fullmatch(r"[0-9a-f-]{36}", made)
    refused = httpx.post(f"{stack.http_url}/v2/logging", headers={"X-Request-Id": "refused.1"})
    assert refused.headers["X-Request-Id"] == "refused.1"


def test_haproxy_logs_an_object_a_line_and_no_text(stack: Stack) -> None:
    secret = "nobody may read this"  # noqa: S105 (a text)
    ids = {"log.gateway", "log.http"}
    answers = [
        httpx.post(
            f"{stack.gateway_url}/embed?secret={secret}",
            json={"inputs": secret},
            headers={"X-Request-Id": "log.gateway", "Authorization": f"Bearer {secret}"},
        ),
        httpx.post(
            f"{stack.http_url}{INFER}",
            json={"inputs": [TEXT | {"data": [secret]}]},
            headers={"X-Request-Id": "log.http"},
        ),
    ]
    assert [answer.status_code for answer in answers] == [200, 200]

    def lines() -> list[dict[str, Any]]:
        found = [line for line in stack.log("haproxy").splitlines() if line.startswith("{")]
        return [line for line in map(json.loads, found) if line["request_id"] in ids]

    wait_until(lambda: len(lines()) == 2, "HAProxy's log", 5)
    for line in lines():
        assert line["part"] == "haproxy"
        assert line["status"] == 200
        assert line["server"].rstrip("0123456789") in ("gateway", "triton")
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", line["time"])
    assert secret not in stack.log("haproxy")


# -- who watches --


def test_prometheus_reaches_everything(stack: Stack) -> None:
    def up() -> dict[str, int]:
        jobs = [series["metric"]["job"] for series in _query(stack, "up == 1")]
        return {job: jobs.count(job) for job in sorted(set(jobs))}

    replicas = {"gateway": 2, "haproxy": 1, "server": 3, "triton": 3}
    wanted = {f"arrowhead-{part}": number for part, number in replicas.items()}
    wait_until(lambda: up() == wanted, "all targets", 20)


def test_prometheus_has_the_alerts_and_none_is_raised(stack: Stack) -> None:
    answer = httpx.get(f"{stack.prometheus_url}/api/v1/rules").json()["data"]
    rules = [rule for group in answer["groups"] for rule in group["rules"]]
    assert len(rules) > 10
    assert [rule["name"] for rule in rules if rule["health"] == "err"] == []
    assert [rule["name"] for rule in rules if rule["state"] == "firing"] == []


def test_what_grafana_and_the_alerts_ask_for_is_there(stack: Stack) -> None:
    httpx.post(f"{stack.gateway_url}/embed", json={"inputs": 1})  # so that one was refused
    dashboard = json.loads((ROOT / "deploy/grafana/dashboards/arrowhead.json").read_text())
    asked = [
        target["expr"].replace("$__rate_interval", "1m")
        for panel in dashboard["panels"]
        for target in panel.get("targets", [])
    ]
    assert len(asked) > 20
    for expression in asked:
        answer = httpx.get(f"{stack.prometheus_url}/api/v1/query", params={"query": expression})
        assert answer.status_code == 200, (expression, answer.text)
    rules = (ROOT / "deploy/prometheus/alerts.yml").read_text()
    names = set(re.findall(r"\b(?:arrowhead|nv|haproxy)_\w+", " ".join([*asked, rules])))
    names -= GPU

    def missing() -> set[str]:
        answer = httpx.get(f"{stack.prometheus_url}/api/v1/label/__name__/values").json()
        return names - set(answer["data"])

    wait_until(lambda: not missing(), f"metrics {missing()}", 20)


# -- start and end --


def test_haproxy_reads_its_file_again_and_nobody_notices(stack: Stack) -> None:
    before = _workers(stack)
    with Client(stack.grpc_url, batch_size=1, retries=0) as client:
        stack.reload_haproxy()
        for number in range(200):
            client.embed(f"during a reload {number}")
    assert _workers(stack) - before
    wait_until(lambda: stack.is_ready("haproxy"), "HAProxy", 10)


def test_a_part_is_stopped_and_started(stack: Stack) -> None:
    stack.stop("gateway2")
    assert stack.pid("gateway2") == 0
    wait_until(lambda: stack.servers_up()["gateways"] == 1, "HAProxy to notice", 5)
    stack.start("gateway2")
    wait_until(lambda: stack.is_ready("haproxy"), "HAProxy to notice", 20)


def test_what_is_killed_is_started_anew(stack: Stack) -> None:
    before = stack.pid("prometheus")
    stack.kill("prometheus")
    wait_until(lambda: stack.pid("prometheus") not in (0, before), "another Prometheus", 10)
    wait_until(lambda: stack.is_ready("prometheus"), "it to be ready", 20)


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_make_stack_leaves_nothing(minilm_repository: Path, end: signal.Signals) -> None:
    need(*NEEDED)
    prefix = free_prefix()
    command = [sys.executable, "-m", "deploy.stack", f"--repository={minilm_repository}"]
    parts = ["dnsmasq", "triton1", "gateway1", "haproxy", "prometheus"]
    with subprocess.Popen(
        [*command, f"--prefix={prefix}", "--replicas=1", "--gateways=1"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            told = [line.split()[0] for line in itertools.islice(process.stdout, len(parts) + 1)]
            assert told == [*parts, "ready"]
            ours = _processes(prefix)
            assert len(ours) >= len(parts)
            assert _shared_memory(ours)
            folder = _folder(ours)
        finally:
            process.send_signal(end)
        process.wait(30)
    wait_until(lambda: not any(each.is_running() for each in ours), "all processes' ends", 30)
    assert process.returncode == (-signal.SIGKILL if end == signal.SIGKILL else 0)
    assert _processes(prefix) == []
    assert _shared_memory(ours) == []
    wait_until(lambda: not folder.exists(), "the end of the private folder", 10)


def test_what_is_missing_is_named(
    stack: Stack, minilm_repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StackError, match=rf"cannot listen on {stack.prefix}\.11:8000"):
        Stack(minilm_repository, prefix=stack.prefix).__enter__()
    monkeypatch.setattr(stack_module, "_WANTED", ("haproxy", "no-such-program"))
    with pytest.raises(StackError, match=r"^no-such-program: .* sudo scripts/test-packages"):
        Stack(minilm_repository, prefix=free_prefix()).__enter__()


def test_what_ends_while_it_starts_is_told_at_once(tmp_path: Path) -> None:
    need(*NEEDED)
    with pytest.raises(StackError, match="triton1 ended while it started") as caught:
        Stack(tmp_path, replicas=1, gateways=1, prefix=free_prefix()).__enter__()
    assert "holds no embedding model" in str(caught.value)  # its log


def _query(stack: Stack, expression: str) -> list[dict[str, Any]]:
    answer = httpx.get(f"{stack.prometheus_url}/api/v1/query", params={"query": expression})
    found: list[dict[str, Any]] = answer.json()["data"]["result"]
    return found


def _untouched(stack: Stack) -> bool:
    """No Triton was started anew."""
    for name in stack.tritons:
        metrics = httpx.get(f"http://{stack.address(name)}:8003/metrics").text
        if "\narrowhead_server_restarts_total 0.0\n" not in metrics:
            return False
    return True


def _workers(stack: Stack) -> set[int]:
    return {child.pid for child in psutil.Process(stack.pid("haproxy")).children()}


def _processes(prefix: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        if any(f"{prefix}." in argument for argument in command) and "deploy.stack" not in command:
            found.append(process)
    return found


def _shared_memory(processes: list[psutil.Process]) -> list[Path]:
    """Files of these only: others may run a Triton beside."""
    folder = Path("/dev/shm")  # noqa: S108 (where POSIX shared memory lives)
    return [file for each in processes for file in folder.glob(f"arrowhead-{each.pid}-*")]


def _folder(processes: list[psutil.Process]) -> Path:
    """The stack's private folder, out of what Prometheus was told."""
    (found,) = {
        Path(argument.removeprefix("--config.file=")).parents[1]
        for each in processes
        for argument in each.cmdline()
        if argument.startswith("--config.file=")
    }
    assert found.is_dir()
    return found
