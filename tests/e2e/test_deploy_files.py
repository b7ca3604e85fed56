# SPDX-License-Identifier: Apache-2.0
"""The files of deploy/ and docker-compose.yml, by those programs that read or judge them.

No Docker engine runs in tests: what is built and run of them, test_install.py and test_stack.py do.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import httpx
import pytest
import yaml
from click.testing import CliRunner

from arrowhead_client import Client, Unavailable
from arrowhead_client.cli import main
from arrowhead_server.command import serve
from arrowhead_server.gateway.command import gateway
from arrowhead_server.gateway.settings import Settings
from arrowhead_server.triton import EXIT_TIMEOUT_S
from perf.peers.servers import free_port, listens, started

from .conftest import wait_until
from .stacks import PLACES, need

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
PUBLISHED = {"haproxy": {8080, 8000, 8001}, "prometheus": {9090}, "grafana": {3000}}
HAPROXY = (DEPLOY / "haproxy" / "haproxy.cfg").read_text()
TOOLS = Path(sys.executable).parent


def run(*command: str | Path, cwd: Path = ROOT, **environment: str) -> str:
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, "PATH": PLACES, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    """docker-compose.yml's services, as docker-compose reads them."""
    need("docker-compose")
    read: dict[str, Any] = yaml.safe_load(run("docker-compose", "config"))
    return read["services"]  # type: ignore[no-any-return]


@pytest.mark.parametrize("profile", ["cpu", "gpu", "convert"])
def test_docker_compose_takes_each_profile(profile: str) -> None:
    need("docker-compose")
    run("docker-compose", "--profile", profile, "config", "--quiet")


def test_compose_follows_the_specification() -> None:
    run(TOOLS / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", "docker-compose.yml")


def test_no_container_may_do_what_it_need_not(services: dict[str, Any]) -> None:
    for name, service in services.items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert "privileged" not in service, name


def test_only_loopback_is_published(services: dict[str, Any]) -> None:
    for name, service in services.items():
        ports = service.get("ports", [])
        assert all(port.startswith("127.0.0.1:") for port in ports), name
        found = {int(port.removesuffix("/tcp").rpartition(":")[2]) for port in ports}
        assert found == PUBLISHED.get(name, set()), name
        # A way out of the machine for those only that need it.
        wants_out = name in PUBLISHED or name == "convert"
        assert ("published" in service["networks"]) == wants_out, name


def test_every_image_is_of_a_version(services: dict[str, Any]) -> None:
    names = [service["image"] for service in services.values()]
    names += re.findall(r"^FROM (\S*[:/]\S+)", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    assert len(names) > len(services)
    assert [name for name in names if not re.search(r":v?\d+\.\d+[\w.-]*$", name)] == []


def test_the_servers_take_their_commands(services: dict[str, Any]) -> None:
    ours = [
        service for name, service in services.items() if name in ("triton", "triton-gpu", "gateway")
    ]
    assert len(ours) == 3
    for service in ours:
        # Options that there are not are refused before the help is shown.
        result = CliRunner().invoke(main, [*service["command"], "--help"])
        assert result.exit_code == 0, result.output


@pytest.mark.parametrize("name", ["triton", "triton-gpu"])
def test_a_server_has_memory_to_share_and_reads_its_models_only(
    services: dict[str, Any], name: str
) -> None:
    service = services[name]
    assert service["shm_size"]
    assert any(volume.endswith(":/models:ro") for volume in service["volumes"])
    assert service["networks"]["inside"]["aliases"] == ["triton"]


def megabytes(size: str) -> float:
    number, unit = re.fullmatch(r"(\d+)([mg])", size).groups()  # type: ignore[union-attr]
    return float(number) * {"m": 1, "g": 1024}[unit]


def test_no_container_takes_all_memory(services: dict[str, Any]) -> None:
    for name, service in services.items():
        filled = megabytes(service.get("shm_size", "0m"))
        for mount in service.get("tmpfs", []):
            filled += megabytes(re.search(r"size=(\w+)", mount).group(1))  # type: ignore[union-attr]
        assert megabytes(service["mem_limit"]) > filled + 200, name


@pytest.mark.parametrize(
    ("name", "command", "finishes_s"),
    [
        ("triton", serve, EXIT_TIMEOUT_S + 2),  # Triton's own end, then the supervisor's
        ("triton-gpu", serve, EXIT_TIMEOUT_S + 2),
        ("gateway", gateway, Settings("", "").timeout_s),
    ],
)
def test_a_stopped_container_drains_before_it_is_killed(
    services: dict[str, Any], name: str, command: click.Command, finishes_s: float
) -> None:
    service = services[name]
    _, *options = service["command"]
    drain_s = command.make_context(str(command.name), options).params["drain_s"]
    # Four of HAProxy's looks at /ready (400 ms, then 200 ms), each with up to 600 ms for an answer.
    assert drain_s > 4
    assert drain_s + finishes_s < int(service["stop_grace_period"].removesuffix("s"))
    # SIGTERM begins the drain: the image asks for it, `init` passes it on, nothing else is said.
    assert "stop_signal" not in service
    assert service["init"] is True
    target = service["build"]["target"]
    (stage,) = re.findall(rf"^FROM \S+ AS {target}\n(?:(?!FROM ).*\n)*", DOCKERFILE, re.MULTILINE)
    assert "\nSTOPSIGNAL SIGTERM\n" in stage


def test_haproxy_finishes_what_is_open_when_it_is_stopped(services: dict[str, Any]) -> None:
    service = services["haproxy"]
    assert service["stop_signal"] == "SIGUSR1"
    configuration = (DEPLOY / "haproxy" / "haproxy.cfg").read_text()
    (ends,) = re.findall(r"hard-stop-after (\d+)s", configuration)
    assert service["stop_grace_period"] in ("140s", "2m20s")
    assert int(ends) < 140


def test_the_images_are_linted() -> None:
    run(TOOLS / "hadolint", "--failure-threshold", "style", DEPLOY / "Dockerfile")


@pytest.mark.parametrize("target", ["triton", "gateway", "convert"])
def test_the_images_run_as_nobody_in_particular(target: str) -> None:
    stages = re.split(r"^FROM ", (DEPLOY / "Dockerfile").read_text(), flags=re.MULTILINE)
    (stage,) = (stage for stage in stages if re.match(rf"\S+ AS {target}\n", stage))
    assert "\nUSER 1000:1000\n" in stage
    # NVIDIA's own stays before ours: it has CUDA work with older drivers.
    nvidia = '"/opt/nvidia/nvidia_entrypoint.sh", ' if target == "triton" else ""
    assert f'ENTRYPOINT [{nvidia}"arrowhead"' in stage


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {
            "ARROWHEAD_LISTEN": "127.0.0.1",
            "ARROWHEAD_DNS": "127.0.0.1:8053",
            "ARROWHEAD_TRITON": "triton.arrowhead.svc.cluster.local",
        },
    ],
)
def test_haproxy_takes_its_file_without_a_warning(environment: dict[str, str]) -> None:
    need("haproxy")
    output = run("haproxy", "-c", "-f", DEPLOY / "haproxy" / "haproxy.cfg", **environment)
    assert output.strip() == "Configuration file is valid"


@contextmanager
def haproxy_before(server: str, folder: Path, text: str = HAPROXY) -> Iterator[dict[int, int]]:
    """HAProxy by its file, with one server in the place of all; its ports, by those in the file."""
    need("haproxy")
    ports = {port: free_port() for port in (8080, 8000, 8001, 8404)}
    for theirs, ours in ports.items():
        text = text.replace(f'"${{ARROWHEAD_LISTEN-*}}:{theirs}"', f'"127.0.0.1:{ours}"')
    text = re.sub(
        r"server-template (\S+) 1-16 \S+(.*)",
        rf"server \1 {server}\2 no-check init-addr last",
        text,
    )
    (folder / "haproxy.cfg").write_text(text)
    command = [str(shutil.which("haproxy", path=PLACES)), "-db", "-f", f"{folder}/haproxy.cfg"]
    with started(command, []) as haproxy:
        wait_until(lambda: haproxy.is_alive() and listens(ports[8080]), "HAProxy", 10)
        yield ports


def test_who_is_answered_too_late_is_told_503(tmp_path: Path) -> None:
    """A gateway that is ready, and busy with others: its socket takes requests and answers none."""
    text = HAPROXY.replace("timeout server 10s", "timeout server 300ms")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        at = f"127.0.0.1:{silent.getsockname()[1]}"
        with haproxy_before(at, tmp_path, text) as ports:
            url = f"http://127.0.0.1:{ports[8080]}/embed"
            answer = httpx.post(url, json={"inputs": "a text"}, timeout=20)
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
    assert "no answer in time" in answer.json()["error"]


# A Triton that dies when the beginning of its answer has gone out.
DIES = """
import os, signal, sys, time
from concurrent.futures import ThreadPoolExecutor
import grpc
from tritonclient.grpc import service_pb2_grpc as service
class Dying(service.GRPCInferenceServiceServicer):
    def ModelInfer(self, request, context):
        context.send_initial_metadata(())
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)
server = grpc.server(ThreadPoolExecutor(1))
service.add_GRPCInferenceServiceServicer_to_server(Dying(), server)
server.add_insecure_port(sys.argv[1])
server.start()
server.wait_for_termination()
"""


def test_an_answer_that_breaks_off_may_be_asked_for_again(tmp_path: Path) -> None:
    """HAProxy cannot ask another any more, and gRPC's word for it is UNKNOWN."""
    port = free_port()
    at = f"127.0.0.1:{port}"
    with (
        started([sys.executable, "-c", DIES, at], []) as triton,
        haproxy_before(at, tmp_path) as ports,
        Client(f"grpc://127.0.0.1:{ports[8001]}", retries=0) as client,
    ):
        wait_until(lambda: triton.is_alive() and listens(port), "the server", 20)
        with pytest.raises(Unavailable, match="broke off") as caught:
            client.embed(["a text"])
    assert caught.value.status == "StatusCode.UNKNOWN"


def test_prometheus_takes_its_files() -> None:
    need("promtool")
    run("promtool", "check", "config", DEPLOY / "prometheus" / "prometheus.yml")


def test_each_alert_rises_when_it_should_and_else_does_not() -> None:
    need("promtool")
    run("promtool", "test", "rules", "alerts_test.yml", cwd=DEPLOY / "prometheus")
    expected = (DEPLOY / "prometheus" / "alerts_test.yml").read_text()
    for rule in rules():
        assert f'alertname="{rule["alert"]}"' in expected


def test_each_alert_says_what_to_do() -> None:
    for rule in rules():
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert rule["annotations"]["summary"]
        assert len(rule["annotations"]["runbook"]) > 40, rule["alert"]


def test_the_docs_name_each_alert() -> None:
    page = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\w+(?:, \w+)*) \| (page|ticket) \| \S", page, re.MULTILINE)
    told = {name: severity for names, severity in rows for name in names.split(", ")}
    assert told == {rule["alert"]: rule["labels"]["severity"] for rule in rules()}


def test_a_test_of_an_alert_can_fail(tmp_path: Path) -> None:
    need("promtool")
    folder = tmp_path / "prometheus"
    shutil.copytree(DEPLOY / "prometheus", folder)
    alerts = (folder / "alerts.yml").read_text()
    assert alerts.count(" > 24\n") == 1
    (folder / "alerts.yml").write_text(alerts.replace(" > 24\n", " > 2400\n"))
    done = subprocess.run(
        ["promtool", "test", "rules", "alerts_test.yml"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "QueueGrows" in done.stdout + done.stderr


def rules() -> Iterator[dict[str, Any]]:
    read = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())
    for group in read["groups"]:
        yield from group["rules"]
