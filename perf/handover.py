# SPDX-License-Identifier: Apache-2.0
"""`python -m perf.handover`: how texts and vectors change hands between caller and Triton.

1. Texts to vectors over gRPC, over HTTP, and over gRPC with Triton's system shared memory in place
   of the tensors' bytes: with MiniLM, with answers from the response cache, and with an encoder
   that computes nothing, where handing over is all there is.
2. What a list of `str` and an Arrow array cost the client until they are Triton's bytes.

Triton is started here, for `arrowhead serve` closes the interface that registers shared memory.
"""

from __future__ import annotations

import itertools
import os
import secrets
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import psutil
import pyarrow as pa
import tritonclient.grpc as wire
from tqdm import tqdm
from tritonclient.grpc import service_pb2
from tritonclient.utils import shared_memory

from arrowhead_client import Client, FakeTransport, GrpcTransport, HttpTransport, Request, Transport
from arrowhead_client._plan import Answer, Settings, encode_texts
from arrowhead_server.address import Address, free_address
from arrowhead_server.process import Janitor
from arrowhead_server.repository import read_repository
from arrowhead_server.triton import command_line, find_triton
from perf.common import Run, common_options, end_as_ctrl_c_does
from perf.copies import with_no_op
from perf.machine import Bystanders, describe
from perf.report import head, table
from perf.server import MODEL, ServeFailed
from perf.stats import Sample
from perf.texts import Texts, mixed, of_tokens

GRPC, HTTP = "gRPC", "HTTP"
VECTORS, BOTH = "gRPC, vectors in shared memory", "gRPC, texts and vectors in shared memory"
ROADS = (GRPC, HTTP, VECTORS, BOTH)
NEW, AGAIN, NOTHING = "MiniLM, new texts", "MiniLM, from the cache", "an encoder of ones, new texts"
REPEATS = {1: 40, 32: 10, 100: 5, 2_000: 1}  # calls a turn, by texts a call
PACKED = (2_000, 20_000)
BATCH = 100  # texts a request: the most that there may be, for the least hand-overs
TOKENS = 16
_SLOTS = 64  # more than the requests of a call, so that no answer is written over while it is read
_SLOT_BYTES = 1 << 20
_START_TIMEOUT_S = 120.0
_RELEASE_TIMEOUT_S = 10.0
# Flags that close administration to callers, and those by which Triton follows the repository.
_NOT_HERE = (
    "--http-restricted-api",
    "--grpc-restricted-protocol",
    "--model-control-mode",
    "--repository-poll-secs",
)
_ZEROS = np.zeros((BATCH, 384), np.float32)


@dataclass(frozen=True)
class Handed:
    """One call of so many texts over one road.

    Attributes:
        ms: of the whole call, by the clock.
        client_ms, server_ms: CPU time of a call, in this process and in all of Triton's.
    """

    work: str
    texts: int
    road: str
    ms: Sample
    client_ms: Sample
    server_ms: Sample

    @property
    def cpu_ms(self) -> float:
        """Of both sides; others' work on the machine touches it less than the clock."""
        return self.client_ms.median + self.server_ms.median


@dataclass(frozen=True)
class Packing:
    """CPU time of the client for so many texts of 5 to 60 words.

    Attributes:
        ms: until they are the bytes of requests.
        call_ms: of a whole call, with a transport that then answers at once, with zeros.
    """

    texts: int
    way: str
    ms: Sample
    call_ms: Sample


@dataclass(frozen=True)
class HandoverResults(Run):
    """All of it."""

    handed: list[Handed]
    packings: list[Packing]


class SharedMemoryTransport(GrpcTransport):
    """gRPC that passes tensors through Triton's system shared memory: the best that it can do.

    An answer lies in the region itself, for the next `_SLOTS` requests.

    Args:
        url: `grpc://host:port` of a Triton that lets callers register shared memory.
        inputs: whether texts go this way too.
        width: D.
    """

    def __init__(self, url: str, *, inputs: bool, width: int) -> None:
        super().__init__(url)
        self._inputs, self._width = inputs, width
        self._numbers = itertools.count()
        self._admin = wire.InferenceServerClient(url.removeprefix("grpc://"))
        size = 2 * _SLOTS * _SLOT_BYTES  # of each slot, texts and then vectors
        self._name = f"arrowhead-handover-{secrets.token_hex(8)}"
        self._region = shared_memory.create_shared_memory_region(
            self._name, self._name, size, create_only=True
        )
        self._admin.register_system_shared_memory(self._name, self._name, size)

    def infer(self, request: Request, timeout_s: float) -> Answer:
        """See `Transport.infer`."""
        start = next(self._numbers) % _SLOTS * 2 * _SLOT_BYTES
        (text,) = request.inputs()
        message = service_pb2.ModelInferRequest(model_name=request.model)
        tensor = message.inputs.add(name=text.name, datatype=text.kind, shape=text.shape)
        if self._inputs:
            content = np.frombuffer(text.content, np.uint8)
            shared_memory.set_shared_memory_region(self._region, [content], start)
            self._place(tensor, start, len(content))
        else:
            message.raw_input_contents.append(text.content)
        shape = [len(request), self._width]
        start += _SLOT_BYTES
        self._place(message.outputs.add(name="embeddings"), start, 4 * shape[0] * shape[1])
        self._stub.ModelInfer(message, timeout=timeout_s)
        vectors = shared_memory.get_contents_as_numpy(self._region, np.float32, shape, start)
        return {"embeddings": vectors}

    def close(self) -> None:
        """Gives the region back, too."""
        super().close()
        deadline = time.monotonic() + _RELEASE_TIMEOUT_S
        while True:
            try:
                self._admin.unregister_system_shared_memory(self._name)
                break
            except wire.InferenceServerException:  # Triton lets go of it after it has answered
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
        self._admin.close()
        shared_memory.destroy_shared_memory_region(self._region)

    def _place(self, tensor: Any, start: int, size: int) -> None:
        tensor.parameters["shared_memory_region"].string_param = self._name
        tensor.parameters["shared_memory_byte_size"].int64_param = size
        tensor.parameters["shared_memory_offset"].int64_param = start


@contextmanager
def open_triton(repository: Path) -> Iterator[tuple[Address, list[int]]]:
    """A Triton on free ports that lets callers register shared memory, and its processes.

    Raises:
        ServeFailed: it is not ready in time.
    """
    address = free_address()
    prefix = f"arrowhead-handover-{os.getpid()}-"
    runtime = Path(tempfile.mkdtemp(prefix="arrowhead-handover-"))
    with Janitor(runtime, prefix):
        triton = find_triton(runtime)
        models = read_repository(repository)
        command = command_line(
            triton, repository, models, address, shm_prefix=prefix, verbose=False
        )
        process = subprocess.Popen(
            [flag for flag in command if not flag.startswith(_NOT_HERE)],
            env={**triton.environment, "PYTHONDONTWRITEBYTECODE": "1"},  # the models are not ours
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            began = time.monotonic()
            with Client(f"http://127.0.0.1:{address.http_port}", model=MODEL) as client:
                while not client.ready():
                    if process.poll() is not None or time.monotonic() - began > _START_TIMEOUT_S:
                        raise ServeFailed(f"Triton is not ready: {' '.join(command[:2])}")
                    time.sleep(0.1)
            stubs = [
                one.pid
                for one in psutil.process_iter(["name", "ppid"])
                if one.info == {"name": "triton_python_backend_stub", "ppid": process.pid}
            ]
            yield address, [process.pid, *stubs]
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # its stubs are of its group
            process.wait()


@contextmanager
def roads(address: Address) -> Iterator[dict[str, Client]]:
    """A client for each road, all of which give the same vectors."""
    grpc_url = f"grpc://127.0.0.1:{address.grpc_port}"
    with Client(grpc_url, model=MODEL) as client:
        wanted = client.embed(["one text", "another text"])
    shared = partial(SharedMemoryTransport, grpc_url, width=wanted.shape[1])
    makers: dict[str, Callable[[], Transport]] = {
        GRPC: partial(GrpcTransport, grpc_url),
        HTTP: partial(HttpTransport, f"http://127.0.0.1:{address.http_port}"),
        VECTORS: partial(shared, inputs=False),
        BOTH: partial(shared, inputs=True),
    }
    with ExitStack() as stack:
        clients = {
            name: stack.enter_context(Client(model=MODEL, transport=make(), batch_size=BATCH))
            for name, make in makers.items()
        }
        for client in clients.values():
            np.testing.assert_array_equal(client.embed(["one text", "another text"]), wanted)
        yield clients


def handed(
    work: str,
    triton: tuple[Address, list[int]],
    sizes: Sequence[int],
    source: Texts,
    rounds: int,
) -> list[Handed]:
    """Every road at every size, in turns."""
    make = of_tokens(TOKENS)
    found = []
    address, pids = triton
    with roads(address) as clients:
        for size in tqdm(sizes, desc=work, unit="size", disable=None):
            repeats = REPEATS[size]
            same = [make(source) for _ in range(size)]
            seen: dict[str, list[tuple[float, float, float]]] = {name: [] for name in clients}
            for number in range(rounds + 1):
                for name, client in clients.items():
                    texts = [
                        same if work == AGAIN else [make(source) for _ in range(size)]
                        for _ in range(repeats)
                    ]
                    before = (time.perf_counter(), time.process_time(), cpu_s(pids))
                    for some in texts:
                        client.embed_arrow(some)
                    after = (time.perf_counter(), time.process_time(), cpu_s(pids))
                    if number:  # the first round warms up
                        took = [(b - a) * 1e3 / repeats for a, b in zip(before, after, strict=True)]
                        seen[name].append((took[0], took[1], took[2]))
            for name, rows in seen.items():
                ms, client_ms, server_ms = (Sample.of(one) for one in zip(*rows, strict=True))
                found.append(Handed(work, size, name, ms, client_ms, server_ms))
    return found


def cpu_s(pids: Sequence[int]) -> float:
    """CPU seconds of these processes so far, to the nanosecond, all threads that they ever had."""
    # Linux's name of another process's CPU clock: what clock_getcpuclockid(3) gives.
    return sum(time.clock_gettime(~pid << 3 | 2) for pid in pids)


def packings(counts: Sequence[int], rounds: int) -> list[Packing]:
    """A list of `str` and an Arrow array, to the bytes of requests, in turns."""
    settings = Settings(MODEL, timeout_s=1.0, retries=0, concurrency=1, batch_size=BATCH)
    found = []
    for count in counts:
        source = Texts(seed=count)
        listed = [mixed(source) for _ in range(count)]
        array = pa.array(listed)
        ways: dict[str, tuple[Any, Callable[[Request], object]]] = {
            "a list, packed by tritonclient": (listed, packed_by_tritonclient),
            "a list": (listed, Request.inputs),
            "an Arrow array": (array, Request.inputs),
        }
        alone: dict[str, list[float]] = {way: [] for way in ways}
        calls: dict[str, list[float]] = {way: [] for way in ways}
        for number in range(rounds + 1):
            for way, (texts, pack) in ways.items():
                began = time.process_time()
                for request in settings.embed_requests(encode_texts(texts)):
                    pack(request)
                packed = time.process_time()
                fake = FakeTransport(answer=partial(answered, pack))
                with Client(transport=fake, batch_size=BATCH) as client:
                    before = time.process_time()
                    client.embed_arrow(texts)
                    after = time.process_time()
                if number:
                    alone[way].append((packed - began) * 1e3)
                    calls[way].append((after - before) * 1e3)
        found += [Packing(count, way, Sample.of(alone[way]), Sample.of(calls[way])) for way in ways]
    return found


def packed_by_tritonclient(request: Request) -> None:
    """What tritonclient makes of texts."""
    texts = np.array(request.texts, np.object_).reshape(-1, 1)
    wire.InferInput("text", texts.shape, "BYTES").set_data_from_numpy(texts)


def answered(pack: Callable[[Request], object], request: Request) -> Answer:
    """Zeros, once the texts are packed."""
    pack(request)
    return {"embeddings": _ZEROS[: len(request)]}


def measure(repository: Path, quick: bool) -> HandoverResults:
    """All of it."""
    began, machine, bystanders = time.monotonic(), describe(), Bystanders()
    rounds, sizes = (2, (1, 100)) if quick else (9, tuple(REPEATS))
    source = Texts()
    bystanders.look()
    packed = packings(PACKED[:1] if quick else PACKED, rounds)
    with open_triton(repository) as triton:
        bystanders.look()
        found = handed(NEW, triton, sizes, source, rounds)
        found += handed(AGAIN, triton, sizes, source, rounds)
    with tempfile.TemporaryDirectory(prefix="arrowhead-handover-") as name:
        copy = with_no_op(repository, Path(name) / "repository")
        with open_triton(copy) as triton:
            found += handed(NOTHING, triton, sizes, source, rounds)
    bystanders.look()
    return HandoverResults(
        machine=machine,
        quick=quick,
        seconds=time.monotonic() - began,
        other_work=Sample.of(bystanders.percent),
        handed=found,
        packings=packed,
    )


def page(results: HandoverResults) -> str:
    """The page; every number on it comes from the results."""
    parts = head(
        results,
        "Hand-over",
        "Written by `python -m perf.handover`; overwritten by each run. Figures are medians, with "
        f"the lowest and highest in brackets. Texts are of {TOKENS} tokens, {BATCH} a request, 4 "
        "requests at once. The last column compares the CPU time of both sides. CUDA shared memory "
        "needs a GPU and is not measured.",
    )
    for work in (NEW, AGAIN, NOTHING):
        rows = [one for one in results.handed if one.work == work]
        base = {one.texts: one for one in rows if one.road == GRPC}
        parts += [
            f"## {work[0].upper()}{work[1:]}",
            table(
                ["texts, road", "ms", "of gRPC's", "client's CPU, ms", "Triton's", "of gRPC's"],
                [
                    (
                        f"{one.texts:,}, {one.road}",
                        one.ms.show(),
                        f"{one.ms.median / base[one.texts].ms.median:.2f}",
                        one.client_ms.show(),
                        one.server_ms.show(),
                        f"{one.cpu_ms / base[one.texts].cpu_ms:.2f}",
                    )
                    for one in rows
                ],
            ),
        ]
    listed = {one.texts: one.ms.median for one in results.packings if one.way == "a list"}
    parts += [
        "## Texts to the bytes of requests",
        "CPU time of the client; of a whole call of `embed_arrow` with a transport that answers at "
        "once. Texts of 5 to 60 words.",
        table(
            ["texts", "packed, ms", "us a text", "of a list's", "whole call, ms"],
            [
                (
                    f"{one.texts:,}, {one.way}",
                    one.ms.show(),
                    f"{1e3 * one.ms.median / one.texts:.2f}",
                    f"{one.ms.median / listed[one.texts]:.2f}",
                    one.call_ms.show(),
                )
                for one in results.packings
            ],
        ),
    ]
    return "\n\n".join(parts) + "\n"


@click.command()
@common_options
@click.option("--quick", is_flag=True, help="Few rounds: rough figures, in half a minute.")
def main(repository: Path, out: Path, quick: bool) -> None:
    """Measure how texts and vectors change hands, and write handover.md and handover.json.

    \b
    Example:
      python -m perf.handover --quick --out /tmp/handover
    """  # noqa: D301 (click reads the character)
    end_as_ctrl_c_does()
    try:
        results = measure(repository, quick)
    except ServeFailed as error:
        raise click.ClickException(str(error)) from error
    out.mkdir(parents=True, exist_ok=True)
    (out / "handover.json").write_text(results.to_json(), encoding="utf-8")
    text = page(results)
    (out / "handover.md").write_text(text, encoding="utf-8")
    click.echo(text)


if __name__ == "__main__":
    main()
