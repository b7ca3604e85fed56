# SPDX-License-Identifier: Apache-2.0
"""Engines without servers: a process each in its own environment, timed in turns."""

from __future__ import annotations

import base64
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perf.common import last_line
from perf.machine import ROOT
from perf.peers.environments import PeerUnavailable, quiet_environment
from perf.peers.results import InProcess
from perf.peers.roads import to_vectors
from perf.peers.servers import stop
from perf.stats import Sample, Vectors
from perf.texts import Texts, of_tokens

SHAPES = ((1, 16), (1, 128), (8, 16), (32, 16), (32, 128))  # texts x tokens


@dataclass(frozen=True)
class Engine:
    """An engine to be run in a process of its own.

    Attributes:
        key, title: its name in the results, and for people.
        python: of its environment.
        arguments: engine, variant, folder; see `engines.open_encoder`.
    """

    key: str
    title: str
    python: Path
    arguments: Sequence[str]


class Worker:
    """A running engine."""

    def __init__(self, process: subprocess.Popen[str], said: Callable[[], str]) -> None:
        self._process = process
        self._said = said
        self._read()  # that it is ready

    def time_ms(self, texts: list[str], slice_ms: float) -> list[float]:
        """Milliseconds of each of the calls that fill so much time."""
        taken: list[float] = self._ask({"time": texts, "ms": slice_ms})["ms"]
        return taken

    def embed(self, texts: list[str]) -> Vectors:
        """The texts' vectors [N, D]."""
        return to_vectors(base64.b64decode(self._ask({"embed": texts})["vectors"]))

    def _ask(self, order: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None  # noqa: S101 (tells the type checker)
        with contextlib.suppress(BrokenPipeError):  # reading tells why
            print(json.dumps(order), file=self._process.stdin, flush=True)
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None  # noqa: S101 (tells the type checker)
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            raise PeerUnavailable(f"its process ended: {self._said() or 'no reason'}")
        answer: dict[str, Any] = json.loads(line)
        return answer


@contextlib.contextmanager
def running(engine: Engine) -> Iterator[Worker]:
    """The engine, loaded; its process ends with the context.

    Raises:
        PeerUnavailable: it could not be loaded.
    """
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [str(engine.python), "-m", "perf.peers.worker", *engine.arguments],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,
            env=quiet_environment(),
        )

        def said() -> str:
            log.seek(0)
            return last_line(log.read().decode(errors="replace"))

        try:
            yield Worker(process, said)
        finally:
            stop(process)
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()


def reference(checkpoint: Path) -> Engine:
    """What vectors are compared with: sentence-transformers in float32, of our own environment."""
    arguments = ("torch", "float32", str(checkpoint))
    return Engine("reference", "reference", Path(sys.executable), arguments)


def measure(
    engines: Sequence[Engine],
    *,
    rounds: int,
    slice_ms: float,
    limit_s: float,
    missing: dict[str, str],
) -> list[InProcess]:
    """Times every engine on every shape, all taking turns.

    Args:
        engines: those that fail are left out.
        rounds: how often each gets its turn.
        slice_ms: a turn repeats a call until so much time is spent; once at least.
        limit_s: no round but the first begins after so many seconds.
        missing: gets why an engine failed, by title.
    """
    texts = {shape: _texts(*shape) for shape in SHAPES}
    taken: dict[str, dict[tuple[int, int], list[float]]] = {}
    with contextlib.ExitStack() as stack:
        workers: dict[str, Worker] = {}
        for engine in engines:
            try:
                worker = stack.enter_context(running(engine))
                for own in texts.values():
                    worker.time_ms(own, 0.0)
            except PeerUnavailable as error:
                missing[f"{engine.title} in process"] = str(error)
                continue
            workers[engine.key] = worker
            taken[engine.key] = {shape: [] for shape in SHAPES}
        began = time.monotonic()
        for number in range(rounds):
            if number and time.monotonic() - began > limit_s:
                break
            for shape, own in texts.items():
                for key, worker in workers.items():
                    taken[key][shape] += worker.time_ms(own, slice_ms)
    return [
        InProcess(
            engine.key,
            engine.title,
            {name(shape): Sample.of(ms) for shape, ms in taken[engine.key].items()},
        )
        for engine in engines
        if engine.key in taken
    ]


def name(shape: tuple[int, int]) -> str:
    """Texts x tokens, as results and page call it."""
    return f"{shape[0]} x {shape[1]}"


def _texts(count: int, tokens: int) -> list[str]:
    source, new = Texts(seed=count), of_tokens(tokens)
    return [new(source) for _ in range(count)]
