# SPDX-License-Identifier: Apache-2.0
"""Three Tritons, two gateways, HAProxy and Prometheus on addresses of 127.0.0.0/8.

    PREFIX.1       HAProxy 8080 (gateways), 8000 and 8001 (Tritons), 8404; Prometheus 9090; DNS 8053
    PREFIX.11-19   a Triton each: HTTP 8000, gRPC 8001, metrics 8002, health 8003
    PREFIX.21-29   a gateway each: 8080

HAProxy and Prometheus read the files that docker-compose.yml gives them. `supervisor` runs the
processes and restarts what dies; this module starts it, asks it over a socket in a private folder,
and ends it, also when this process is killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any
from xmlrpc.client import Fault, ServerProxy

from supervisor.xmlrpc import SupervisorTransport

DEPLOY = Path(__file__).resolve().parents[1]
_START_TIMEOUT_S = 180.0
_STOP_TIMEOUT_S = 40.0
_POLL_S = 0.1
_WANTED = ("haproxy", "prometheus", "dnsmasq")
_PORTS = (8000, 8001, 8080, 8404, 9090, 8053)
# Standard input is a pipe of ours. Its end means that we are gone, however that came about.
_WATCH = '"$@" & child=$!; read -r _; kill -s TERM $child; wait $child; rm -rf -- "$STACK"'


class StackError(Exception):
    """What is missing or did not come up, and what to do about it."""


class Stack:
    """The running stack, as a context manager.

    Parts are called by name: `triton1`, `triton2`, ..., `gateway1`, ..., `haproxy`, `prometheus`,
    `dnsmasq`.

    Args:
        repository: of models; all Tritons serve it.
        replicas: Tritons, 1 to 9.
        gateways: 1 to 9.
        prefix: the first three numbers of all addresses.
        on_ready: gets a line for each part that has come up.
    """

    def __init__(
        self,
        repository: Path,
        *,
        replicas: int = 3,
        gateways: int = 2,
        prefix: str = "127.0.0",
        on_ready: Callable[[str], object] = lambda line: None,
    ) -> None:
        self.prefix = prefix
        self.replicas, self.gateways = replicas, gateways
        self._repository = repository.resolve()
        self._on_ready = on_ready

    @property
    def gateway_url(self) -> str:
        """The gateways, through HAProxy."""
        return f"http://{self.prefix}.1:8080"

    @property
    def http_url(self) -> str:
        """The Tritons over HTTP, through HAProxy."""
        return f"http://{self.prefix}.1:8000"

    @property
    def grpc_url(self) -> str:
        """The Tritons over gRPC, through HAProxy."""
        return f"grpc://{self.prefix}.1:8001"

    @property
    def haproxy_url(self) -> str:
        """HAProxy's own pages: /metrics, /ready, /stats."""
        return f"http://{self.prefix}.1:8404"

    @property
    def prometheus_url(self) -> str:
        """Prometheus: its page and its API."""
        return f"http://{self.prefix}.1:9090"

    def address(self, name: str) -> str:
        """The IPv4 address of a part."""
        for kind, first in (("triton", 10), ("gateway", 20)):
            if name.startswith(kind):
                return f"{self.prefix}.{first + int(name.removeprefix(kind))}"
        return f"{self.prefix}.1"

    @property
    def tritons(self) -> list[str]:
        """Their names."""
        return [f"triton{number}" for number in range(1, self.replicas + 1)]

    @property
    def names(self) -> list[str]:
        """All parts, in the order in which they start."""
        gateways = [f"gateway{number}" for number in range(1, self.gateways + 1)]
        return ["dnsmasq", *self.tritons, *gateways, "haproxy", "prometheus"]

    def __enter__(self) -> Stack:
        missing = [name for name in _WANTED if _which(name) is None]
        if missing:
            raise StackError(
                f"{', '.join(missing)}: not on this machine. On Debian or Ubuntu: "
                "sudo scripts/test-packages"
            )
        self._check_ports()
        with contextlib.ExitStack() as cleanup:
            folder = Path(tempfile.mkdtemp(prefix="arrowhead-stack-"))
            cleanup.callback(shutil.rmtree, folder, ignore_errors=True)
            self.folder = folder
            self._write(folder)
            self._launch(folder)
            cleanup.callback(self._end)
            self._wait_for_supervisor()
            for name in self.names:
                self.start(name)
            self._wait_for_all()
            self._cleanup = cleanup.pop_all()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._cleanup.close()

    def start(self, name: str) -> None:
        """Starts a part that was stopped. Returns once the process is there, not ready yet."""
        self._supervisor.startProcess(_full(name))

    def stop(self, name: str) -> None:
        """Ends a part, SIGTERM first, as `docker stop` does, and waits for its end."""
        self._supervisor.stopProcess(_full(name))

    def restart(self, name: str) -> None:
        """Stops and starts a part."""
        self.stop(name)
        self.start(name)

    def kill(self, name: str, number: signal.Signals = signal.SIGKILL) -> None:
        """Sends a signal to a part's first process. If it dies of it, it is started anew."""
        self._supervisor.signalProcess(_full(name), str(int(number)))

    def pid(self, name: str) -> int:
        """The first process of a part (of a Triton: `arrowhead serve`); 0 if it is not there."""
        pid: int = self._supervisor.getProcessInfo(_full(name))["pid"]
        return pid

    def log(self, name: str) -> str:
        """What a part has printed."""
        return (self.folder / "logs" / f"{name}.log").read_text(encoding="utf-8", errors="replace")

    def reload_haproxy(self) -> None:
        """New workers read haproxy.cfg; the old ones finish what they have begun."""
        self.kill("haproxy", signal.SIGUSR2)

    def is_ready(self, name: str) -> bool:
        """Whether a part would do its work now."""
        host = self.address(name)
        if name == "dnsmasq":
            return self.pid(name) != 0
        if name == "haproxy":
            up = self.servers_up()
            wanted = {"triton_http": self.replicas, "triton_grpc": self.replicas}
            wanted |= {"gateways": self.gateways, "gateways_long": self.gateways}
            wanted |= {"overloaded": 0}  # which answers by itself
            return up == wanted
        if name == "prometheus":
            return _status(f"{self.prometheus_url}/-/ready") == 200
        if name in self.tritons:
            return _status(f"http://{host}:8003/ready") == 200
        return _status(f"http://{host}:8080/ready") == 200

    def servers_up(self) -> dict[str, int]:
        """How many servers of each of HAProxy's backends get requests."""
        found = {}
        for line in _read(f"{self.haproxy_url}/metrics").splitlines():
            if line.startswith("haproxy_backend_active_servers{"):
                name = line.split('"')[1]
                found[name] = int(float(line.rpartition(" ")[2]))
        return found

    def _check_ports(self) -> None:
        wanted = [(self.address(name), port) for name in self.tritons for port in range(8000, 8004)]
        wanted += [(f"{self.prefix}.1", port) for port in _PORTS]
        wanted += [(f"{self.prefix}.{20 + n}", 8080) for n in range(1, self.gateways + 1)]
        for address in wanted:
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind(address)
                except OSError as error:
                    raise StackError(
                        f"cannot listen on {address[0]}:{address[1]} ({error.strerror}): stop what "
                        "does, or choose other addresses with --prefix 127.0.1"
                    ) from error

    def _write(self, folder: Path) -> None:
        """What the parts read beside the files of deploy/."""
        (folder / "logs").mkdir()
        tritons = [self.address(name) for name in self.tritons]
        gateways = [f"{self.prefix}.{20 + number}" for number in range(1, self.gateways + 1)]
        hosts = [f"{address} triton\n" for address in tritons]
        hosts += [f"{address} gateway\n" for address in gateways]
        (folder / "hosts").write_text("".join(hosts))
        (folder / "hosts").chmod(0o644)
        targets = folder / "prometheus" / "targets"
        targets.mkdir(parents=True)
        for file in ("prometheus.yml", "alerts.yml"):
            (folder / "prometheus" / file).symlink_to(DEPLOY / "prometheus" / file)
        for job, addresses, port in (
            ("triton", tritons, 8002),
            ("server", tritons, 8003),
            ("gateway", gateways, 8080),
            ("haproxy", [f"{self.prefix}.1"], 8404),
        ):
            found = [{"targets": [f"{address}:{port}" for address in addresses]}]
            (targets / f"{job}.json").write_text(json.dumps(found))

    def _launch(self, folder: Path) -> None:
        bin_folder = Path(sys.executable).parent
        environment = {
            **os.environ,
            "PATH": os.pathsep.join([*_places()]),
            "STACK": str(folder),
            "PREFIX": self.prefix,
            "REPLICAS": str(self.replicas),
            "GATEWAYS": str(self.gateways),
            "REPOSITORY": str(self._repository),
            "ARROWHEAD": str(bin_folder / "arrowhead"),
            "HAPROXY_CFG": str(DEPLOY / "haproxy" / "haproxy.cfg"),
        }
        supervisord = [
            str(bin_folder / "supervisord"),
            "-c",
            str(DEPLOY / "stack/supervisord.conf"),
        ]
        self._shell = subprocess.Popen(
            ["/bin/sh", "-c", _WATCH, "arrowhead-stack", *supervisord],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # a Ctrl-C at the terminal is for us
        )
        self._transport = SupervisorTransport(None, None, f"unix://{folder / 'control'}")
        proxy = ServerProxy("http://127.0.0.1", transport=self._transport)
        self._supervisor: Any = proxy.supervisor

    def _answers(self) -> bool:
        try:
            return bool(self._supervisor.getState()["statename"] == "RUNNING")
        except (OSError, Fault):
            self._transport.close()  # else the next question would go on with this one
            return False

    def _end(self) -> None:
        self._transport.close()  # an interrupt may have come in the middle of a question
        # Their second signal, supervisord's, then ends the drain: nobody asks any more.
        with contextlib.suppress(OSError, Fault):
            for group in ("triton", "gateway"):
                self._supervisor.signalProcessGroup(group, "TERM")
        self._transport.close()
        assert self._shell.stdin is not None  # noqa: S101 (tells the type checker)
        self._shell.stdin.close()
        try:
            self._shell.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired as error:
            raise StackError(f"the stack did not stop within {_STOP_TIMEOUT_S:.0f} s") from error

    def _wait_for_supervisor(self) -> None:
        began = time.monotonic()
        while not self._answers():
            if self._shell.poll() is not None or time.monotonic() - began > _START_TIMEOUT_S:
                log = self.folder / "logs" / "supervisord.log"
                told = log.read_text() if log.exists() else "no log"
                raise StackError(f"supervisord did not come up: {told[-2000:]}")
            time.sleep(_POLL_S)

    def _wait_for_all(self) -> None:
        first = {name: self.pid(name) for name in self.names}
        began = time.monotonic()
        for name in self.names:
            while not self.is_ready(name):
                failure = None
                if self.pid(name) != first[name]:
                    failure = f"{name} ended while it started"
                elif time.monotonic() - began > _START_TIMEOUT_S:
                    failure = f"{name} did not come up within {_START_TIMEOUT_S:.0f} s"
                if failure is not None:
                    raise StackError(f"{failure}; the end of its log:\n{self.log(name)[-2000:]}")
                time.sleep(_POLL_S)
            self._on_ready(f"{name:<11} {time.monotonic() - began:5.1f} s")


def free_prefix() -> str:
    """The first three numbers of addresses on which nobody listens at the stack's ports."""
    for number in random.sample(range(1, 255), 20):
        prefix = f"127.7.{number}"
        with contextlib.suppress(StackError):
            Stack(Path(), prefix=prefix)._check_ports()
            return prefix
    raise StackError("found no free addresses of 127.7.0.0/16")


def _places() -> Iterator[str]:
    """PATH, and where Debian puts servers."""
    yield from filter(None, os.environ.get("PATH", "").split(os.pathsep))
    yield from ("/usr/local/sbin", "/usr/sbin")


def _which(name: str) -> str | None:
    return shutil.which(name, path=os.pathsep.join(_places()))


def _full(name: str) -> str:
    """As supervisor calls it: parts that are several are a group."""
    return f"{name.rstrip('123456789')}:{name}"


def _read(url: str) -> str:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:  # noqa: S310 (our own http URL)
            text: str = answer.read().decode()
            return text
    except (OSError, ValueError):
        return ""


def _status(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:  # noqa: S310 (our own http URL)
            status: int = answer.status
            return status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0
