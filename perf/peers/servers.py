# SPDX-License-Identifier: Apache-2.0
"""The servers: which there are, how each starts, and that each stops."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from perf.common import last_line
from perf.copies import with_dtype
from perf.peers.environments import PeerUnavailable, quiet_environment
from perf.peers.roads import FastApiRoad, GrpcRoad, InfinityRoad, Road, TritonHttpRoad
from perf.server import MODEL, memory_of, served

_START_TIMEOUT_S = 120.0
_STOP_TIMEOUT_S = 10.0
_POLL_S = 0.01


@dataclass(frozen=True)
class Door:
    """A way into a running server.

    Attributes:
        key, title: of the row in the results.
        road: makes a client's way in.
        shared: whether one is enough for all clients, as gRPC's are.
    """

    key: str
    title: str
    road: Callable[[], Road]
    shared: bool = False

    def roads(self, clients: int) -> list[Road]:
        """A way in for each client, or the same one for all."""
        return [self.road()] * clients if self.shared else [self.road() for _ in range(clients)]


@dataclass(frozen=True)
class Running:
    """A server that runs, though it may not listen yet.

    Attributes:
        began: time.perf_counter() when its process was started.
        doors: the ways in; the first is the one that counts for its start and its vectors.
        pid: of its first process.
    """

    began: float
    doors: list[Door]
    pid: int
    is_alive: Callable[[], bool]
    said: Callable[[], str]

    def pss_mb(self) -> float:
        """Memory of all its processes, PSS in MB."""
        return sum(process.pss_mb for process in memory_of(self.pid, "server"))


@dataclass(frozen=True)
class Kind:
    """A server to be measured.

    Attributes:
        key: its name in the results.
        title: for people.
        note: what it does to be fast, for the page.
        start: runs it; leaving the context stops it.
    """

    key: str
    title: str
    note: str
    start: Callable[[], contextlib.AbstractContextManager[Running]]


def fastapi(key: str, title: str, note: str, python: Path, arguments: list[str]) -> Kind:
    """`app` with one of the engines, told by `arguments`: engine, variant, folder."""

    def start() -> contextlib.AbstractContextManager[Running]:
        port = free_port()
        command = [str(python), "-m", "perf.peers.app", *arguments, str(port)]
        return started(command, [Door(key, title, lambda: FastApiRoad(port))])

    return Kind(key, title, note, start)


def infinity(python: Path, checkpoint: Path) -> Kind:
    """The package infinity-emb with its own server."""
    key, title = "infinity", "infinity, torch float32"
    options = {
        "model-id": str(checkpoint),
        "served-model-name": MODEL,
        "engine": "torch",
        "device": "cpu",
        "dtype": "float32",
        "batch-size": "32",
        "host": "127.0.0.1",
        "log-level": "warning",
    }
    flags = ["no-model-warmup", "no-trust-remote-code", "no-compile", "no-bettertransformer"]

    def start() -> contextlib.AbstractContextManager[Running]:
        port = free_port()
        command = [str(python.with_name("infinity_emb")), "v2", f"--port={port}"]
        command += [f"--{name}={value}" for name, value in options.items()]
        command += [f"--{flag}" for flag in flags]
        return started(command, [Door(key, title, lambda: InfinityRoad(port))])

    note = (
        "its own server and its own batching, up to 32 texts, float32; no warm-up at the start, "
        "answers in base64"
    )
    return Kind(key, title, note, start)


def arrowhead(repository: Path, dtype: str, *, http: bool = False, fused: bool = False) -> Kind:
    """`arrowhead serve`, computing in `dtype`, over gRPC and perhaps HTTP too."""
    key, title = f"arrowhead-{dtype}", f"Arrowhead {dtype}"
    if fused:
        key, title = f"{key}-fused", f"{title}, fused"

    @contextlib.contextmanager
    def start() -> Iterator[Running]:
        with tempfile.TemporaryDirectory(prefix="arrowhead-peers-") as folder:
            copy = with_dtype(repository, Path(folder) / "repository", dtype, fused=fused)
            with served(copy) as server:
                grpc_port, http_port = server.address.grpc_port, server.address.http_port
                doors = [Door(key, f"{title}, gRPC", lambda: GrpcRoad(grpc_port), shared=True)]
                if http:
                    doors.append(
                        Door(f"{key}-http", f"{title}, HTTP", lambda: TritonHttpRoad(http_port))
                    )
                yield Running(
                    server.began,
                    doors,
                    server.process.pid,
                    lambda: server.process.poll() is None,
                    lambda: "",
                )

    note = (
        "`arrowhead serve`: Triton's dynamic batcher, packed tokens without padding; raw vectors "
        "both over gRPC and over HTTP with binary tensors; the response cache is on, as always, "
        "but no text comes twice"
    )
    return Kind(key, title, note, start)


@contextlib.contextmanager
def started(command: list[str], doors: list[Door]) -> Iterator[Running]:
    """Runs a command that serves; it is stopped, with all that it started, on leaving."""
    with tempfile.TemporaryFile() as log:
        began = time.perf_counter()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env=quiet_environment(),
        )
        try:
            yield Running(
                began,
                doors,
                process.pid,
                lambda: process.poll() is None,
                lambda: _end_of(log),
            )
        finally:
            stop(process)


def stop(process: subprocess.Popen[Any]) -> None:
    """Ends a process that leads a session of its own, and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(_STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        pass
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


async def first_answer(server: Running) -> float:
    """Asks until the server answers; seconds from the start of its process to its first vector.

    Raises:
        PeerUnavailable: it ended, or was silent for too long.
    """
    road = server.doors[0].road()
    try:
        while True:
            try:
                await road.embed(["the first text that this server ever sees"])
                return time.perf_counter() - server.began
            except OSError:
                await road.close()
            if not server.is_alive():
                raise PeerUnavailable(f"ended while starting: {server.said() or 'no reason'}")
            if time.perf_counter() - server.began > _START_TIMEOUT_S:
                raise PeerUnavailable(f"no answer within {_START_TIMEOUT_S:.0f} s")
            await asyncio.sleep(_POLL_S)
    finally:
        await road.close()


def free_port() -> int:
    """A port on loopback that is free now."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return int(held.getsockname()[1])


def listens(port: int) -> bool:
    """Whether somebody does so on that port of loopback."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _end_of(log: IO[bytes]) -> str:
    log.seek(0)
    return last_line(log.read().decode(errors="replace"))
