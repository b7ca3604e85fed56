# SPDX-License-Identifier: Apache-2.0
"""`arrowhead serve` as users start it, watched from outside: its start, its memory, its cache."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import tritonclient.grpc  # noqa: F401 (the client would import it in a measured moment)

from arrowhead_client import Client
from arrowhead_server.address import Address, free_address
from perf.stats import Sample

MODEL = "minilm"
_START_TIMEOUT_S = 300.0
_STOP_TIMEOUT_S = 20.0
_POLL_S = 0.01  # so exact are the stages of a start
_STUB = "triton_python_backend_stub"


class ServeFailed(Exception):
    """`arrowhead serve` did not come up."""


@dataclass(frozen=True)
class Timeline:
    """Seconds from the start of the process to each stage that can be seen from outside.

    Attributes:
        triton: the process tritonserver runs.
        stubs: both Python models have their process.
        loaded: Triton says ready: the models are loaded and have proved their certificates.
        ready: `arrowhead serve` printed "ready", after an inference of its own.
    """

    triton: float
    stubs: float
    loaded: float
    ready: float


@dataclass(frozen=True)
class Start:
    """One start, to the first embedding over gRPC.

    Attributes:
        timeline: the stages, in seconds.
        first_answer_s: from the start of the process to the first embedding, in seconds.
        first_inference_ms: the first call after "ready", connecting included.
        second_inference_ms: the call after it, with another text.
    """

    timeline: Timeline
    first_answer_s: float
    first_inference_ms: float
    second_inference_ms: float


@dataclass(frozen=True)
class ProcessMemory:
    """One process: resident memory, and its share where pages are shared; MB (10^6 bytes)."""

    name: str
    rss_mb: float
    pss_mb: float


@dataclass(frozen=True)
class CacheCounts:
    """Requests that Triton's response cache answered, and those it did not."""

    hits: int
    misses: int

    def since(self, before: CacheCounts) -> CacheCounts:
        """What was added since `before`."""
        return CacheCounts(self.hits - before.hits, self.misses - before.misses)


@dataclass(frozen=True)
class Served:
    """A running `arrowhead serve`."""

    process: subprocess.Popen[bytes]
    address: Address
    began: float  # time.perf_counter()
    timeline: Timeline

    def client(self, *, batch_size: int = 32, concurrency: int = 4) -> Client:
        """A client over gRPC; close it before the server stops, or the stop takes longer."""
        url = f"grpc://{self.address.host}:{self.address.grpc_port}"
        return Client(url, model=MODEL, batch_size=batch_size, concurrency=concurrency)

    def get(self, path: str) -> Any:
        """The JSON at an HTTP path of Triton."""
        return json.loads(_get(self.address, path))

    def cache_counts(self) -> CacheCounts:
        """What Triton's statistics say of the ensemble's cache until now."""
        return parse_cache_counts(self.get(f"/v2/models/{MODEL}/stats"))

    def compute_dtype(self) -> str:
        """The dtype that the encoder's configuration asks for; "auto" leaves it to the engine."""
        config = self.get(f"/v2/models/{MODEL}_encoder/config")
        return str(config["parameters"]["compute_dtype"]["string_value"])

    def memory(self) -> list[ProcessMemory]:
        """The memory of every process of the server, the largest last."""
        return memory_of(self.process.pid, "arrowhead serve")


def memory_of(root: int, name: str) -> list[ProcessMemory]:
    """The memory of a process, called `name`, and of all below it, the largest last."""
    found = []
    for pid in [root, *descendants(root)]:
        with contextlib.suppress(OSError):  # it ended meanwhile
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
            found.append(parse_smaps_rollup(name if pid == root else role_of(pid), rollup))
    return sorted(found, key=lambda process: process.pss_mb)


@contextlib.contextmanager
def served(repository: Path) -> Iterator[Served]:
    """A server on free loopback ports, ready; stopped at the end, whatever happens.

    Raises:
        ServeFailed: it did not come up; the message is the end of what it said.
    """
    address = free_address()
    command = [
        str(Path(sys.executable).with_name("arrowhead")),
        "serve",
        f"--repository={repository}",
        f"--http-port={address.http_port}",
        f"--grpc-port={address.grpc_port}",
        f"--metrics-port={address.metrics_port}",
        f"--health-port={address.health_port}",
    ]
    with tempfile.TemporaryFile() as errors:
        began = time.perf_counter()
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, start_new_session=True
        )
        try:
            timeline = _watch_start(process, address, began, errors)
            yield Served(process, address, began, timeline)
        finally:
            _stop(process)


def start_once(repository: Path) -> Start:
    """Starts, asks for two embeddings, stops. The client's imports do not count."""
    with served(repository) as server, server.client() as client:
        before = time.perf_counter()
        client.embed("the first text this server ever sees")
        answered = time.perf_counter()
        client.embed("the second text, over the same connection")
        after = time.perf_counter()
        return Start(
            server.timeline,
            first_answer_s=answered - server.began,
            first_inference_ms=(answered - before) * 1e3,
            second_inference_ms=(after - answered) * 1e3,
        )


@dataclass(frozen=True)
class ColdStart:
    """Several starts; seconds from the start of the process, or milliseconds where it says so."""

    triton_s: Sample
    stubs_s: Sample
    loaded_s: Sample
    ready_s: Sample
    first_answer_s: Sample
    first_inference_ms: Sample
    second_inference_ms: Sample

    @classmethod
    def of(cls, starts: list[Start]) -> ColdStart:
        """The medians and spreads of some starts."""
        return cls(
            Sample.of([start.timeline.triton for start in starts]),
            Sample.of([start.timeline.stubs for start in starts]),
            Sample.of([start.timeline.loaded for start in starts]),
            Sample.of([start.timeline.ready for start in starts]),
            Sample.of([start.first_answer_s for start in starts]),
            Sample.of([start.first_inference_ms for start in starts]),
            Sample.of([start.second_inference_ms for start in starts]),
        )

    def stages(self) -> dict[str, float]:
        """Seconds that each stage took, by what happens in it; they add up to the first answer."""
        ends = {
            "Python, supervisor": self.triton_s,
            "Triton, to both model processes": self.stubs_s,
            "models load and prove themselves": self.loaded_s,
            "supervisor's own inference": self.ready_s,
            "first answer over gRPC": self.first_answer_s,
        }
        before = 0.0
        lengths = {}
        for name, end in ends.items():
            lengths[name] = max(end.median - before, 0.0)
            before = max(end.median, before)
        return lengths


def parse_smaps_rollup(name: str, rollup: str) -> ProcessMemory:
    """Reads /proc/PID/smaps_rollup, whose kB are of 1,024 bytes."""
    kib = {}
    for line in rollup.splitlines():
        key, _, rest = line.partition(":")
        if key in ("Rss", "Pss"):
            kib[key] = int(rest.split()[0])
    return ProcessMemory(name, kib["Rss"] * 1024 / 1e6, kib["Pss"] * 1024 / 1e6)


def parse_cache_counts(statistics: Any) -> CacheCounts:
    """Reads Triton's answer to /v2/models/NAME/stats."""
    counts = statistics["model_stats"][0]["inference_stats"]
    return CacheCounts(int(counts["cache_hit"]["count"]), int(counts["cache_miss"]["count"]))


def _watch_start(
    process: subprocess.Popen[bytes], address: Address, began: float, errors: IO[bytes]
) -> Timeline:
    """Looks every few milliseconds until the line "ready" comes."""
    assert process.stdout is not None  # noqa: S101 (tells the type checker)
    seen: dict[str, float] = {}
    triton, printed = 0, b""
    while b"ready in" not in printed:
        if select.select([process.stdout], [], [], _POLL_S)[0]:
            data = os.read(process.stdout.fileno(), 65536)
            printed += data
            if not data:
                process.wait()
                errors.seek(0)
                last = errors.read().decode(errors="replace").strip()[-2000:]
                raise ServeFailed(f"`arrowhead serve` ended while starting: {last or 'no reason'}")
        now = time.perf_counter() - began
        if now > _START_TIMEOUT_S:
            raise ServeFailed(f"`arrowhead serve` was not ready within {_START_TIMEOUT_S:.0f} s")
        if not triton:
            triton = next((pid for pid in _children(process.pid) if _is(pid, "tritonserver")), 0)
            if triton:
                seen["triton"] = now
        elif "stubs" not in seen:
            if sum(_is(pid, _STUB) for pid in _children(triton)) == 2:
                seen["stubs"] = now
        elif "loaded" not in seen and _is_ready(address):
            seen["loaded"] = time.perf_counter() - began
    ready = time.perf_counter() - began
    # A stage shorter than one look is over by the next one.
    loaded = seen.get("loaded", ready)
    stubs = seen.get("stubs", loaded)
    return Timeline(seen.get("triton", stubs), stubs, loaded, ready)


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()  # its janitor ends Triton and the stubs
        process.wait()
    finally:
        if process.stdout is not None:
            process.stdout.close()


def _is_ready(address: Address) -> bool:
    try:
        _get(address, "/v2/health/ready")
    except (OSError, http.client.HTTPException):
        return False
    return True


def _get(address: Address, path: str) -> bytes:
    # One connection a request: an idle open one would hold up Triton's exit.
    connection = http.client.HTTPConnection(address.host, address.http_port, timeout=10)
    try:
        connection.request("GET", path, headers={"Connection": "close"})
        response = connection.getresponse()
        if response.status != http.client.OK:
            raise http.client.HTTPException(f"{path}: status {response.status}")
        return response.read()
    finally:
        connection.close()


def _children(pid: int) -> list[int]:
    # Not psutil: that looks at every process of the machine, which would slow the start watched.
    found: list[int] = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # the thread or the process ended
            found += map(int, file.read_text(encoding="ascii").split())
    return found


def descendants(pid: int) -> list[int]:
    children = _children(pid)
    return [*children, *(below for child in children for below in descendants(child))]


def _arguments(pid: int) -> list[str]:
    try:
        raw = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return []
    return [part.decode(errors="replace") for part in raw.rstrip(b"\0").split(b"\0")]


def _is(pid: int, program: str) -> bool:
    arguments = _arguments(pid)
    return bool(arguments) and Path(arguments[0]).name == program


def role_of(pid: int) -> str:
    """What a process is to the server: Triton, a model's, or the janitor's shell."""
    arguments = _arguments(pid)
    program = Path(arguments[0]).name if arguments else "?"
    if program == _STUB and len(arguments) > 1:
        return Path(arguments[1]).parents[1].name  # repository / model / version / model.py
    return "janitor" if "arrowhead-janitor" in arguments else program
