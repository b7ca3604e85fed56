# SPDX-License-Identifier: Apache-2.0
"""Versions change under load: no failed request, one moment, and nothing broken ever goes live."""

from __future__ import annotations

import asyncio
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np
import numpy.typing as npt
import psutil
import pytest
from click.testing import CliRunner

from arrowhead_client import (
    AsyncClient,
    AsyncGrpcTransport,
    AsyncTransport,
    Client,
    Config,
    Experiment,
    Options,
    Request,
    in_candidate,
)
from arrowhead_client._plan import Answer
from arrowhead_client.cli import main
from arrowhead_conversion import pins
from arrowhead_conversion.convert import convert
from arrowhead_server.gateway.asking import Asking
from arrowhead_server.supervisor import Server, running_server
from perf.copies import tuned as changed

from .conftest import successes, wait_until
from .gateways import started, stopped

Vectors = npt.NDArray[np.float32]
TEXTS = ["one text", "another", "a third one that is somewhat longer than the other two are"]


def arrowhead(*arguments: object) -> str:
    """Runs the command line in this process; what it printed."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def tuned(minilm_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MiniLM, changed a little, as by further training."""
    return changed(minilm_source, tmp_path_factory.mktemp("tuned") / "model")


@pytest.fixture(scope="module")
def prepared(
    minilm_repository: Path, tuned: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A repository with version 1 live and version 2 idle."""
    folder = tmp_path_factory.mktemp("prepared") / "models"
    shutil.copytree(minilm_repository, folder)
    made = convert(str(tuned), "minilm", folder, promote=False, progress=False)
    assert made.version == 2
    assert pins.live(folder, "minilm") == 1
    return folder


@pytest.fixture
def repository(prepared: Path, tmp_path: Path) -> Path:
    return shutil.copytree(prepared, tmp_path / "modèles à servir")


@pytest.fixture
def server(repository: Path) -> Iterator[Server]:
    with running_server(repository) as server:
        yield server


def vectors(server: Server, model: str = "minilm") -> Vectors:
    with Client(server.http_url, model=model) as client:
        return client.embed(TEXTS)


def served_versions(server: Server) -> dict[str, int]:
    return {model.name: model.version for model in server.models}


def memory(server: Server, model: str) -> dict[int, float]:
    """Private megabytes of each of the model's processes."""
    pids = server.stub_pids().get(model, [])
    return {pid: psutil.Process(pid).memory_full_info().uss / 1e6 for pid in pids}


@dataclass
class Sent:
    """One request: when it was sent and answered, and with which version's vectors."""

    text: str
    sent: float
    answered: float
    version: int
    error: str = ""


@dataclass
class Load:
    """Several callers who ask without pause, half of the time for a text that is cached."""

    known: dict[int, Vectors]
    done: list[Sent] = field(default_factory=list)
    stopping: bool = False

    def run(self, url: str) -> None:
        with Client(url, retries=0) as client:
            for number in range(10**9):
                if self.stopping:
                    return
                place = number % len(TEXTS)
                fresh = number % 2 == 0
                # Blanks at the end change the request's bytes, not its tokens.
                text = TEXTS[place] + (" " * (number % 997) if fresh else "")
                sent = time.monotonic()
                try:
                    vector = client.embed(text)
                except Exception as error:  # noqa: BLE001 (counted by the test)
                    self.done.append(Sent(text, sent, time.monotonic(), 0, repr(error)))
                    continue
                answered = time.monotonic()
                near = {v: float(vector @ rows[place]) for v, rows in self.known.items()}
                version = max(near, key=lambda v: near[v])
                wrong = "" if near[version] > 0.9999 else f"no version's vector: {near}"
                self.done.append(Sent(text, sent, answered, version, wrong))

    def failures(self) -> list[Sent]:
        return [sent for sent in self.done if sent.error]

    def late(self, old: int, new: int) -> list[Sent]:
        """Requests sent after the new version was first met, and answered with the old."""
        first = min(sent.answered for sent in self.done if sent.version == new)
        return [s for s in self.done if s.version == old and s.sent > first]

    def worst_ms(self) -> float:
        return max(sent.answered - sent.sent for sent in self.done) * 1e3


class running_load:  # noqa: N801 (a context manager)
    def __init__(self, server: Server, known: dict[int, Vectors]) -> None:
        self.load = Load(known)
        self._urls = [server.grpc_url, server.http_url]
        self._threads = ThreadPoolExecutor(2)

    def __enter__(self) -> Load:
        self._runs = [self._threads.submit(self.load.run, url) for url in self._urls]
        wait_until(lambda: len(self.load.done) > 20, "load")
        return self.load

    def __exit__(self, *_: object) -> None:
        self.load.stopping = True
        for run in self._runs:
            run.result()
        self._threads.shutdown()


@pytest.fixture(scope="module")
def known(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Vectors]:
    """The vectors of both versions, by a server that never served another."""
    found = {}
    for version in (1, 2):
        folder = shutil.copytree(prepared, tmp_path_factory.mktemp("known") / "models")
        arrowhead("promote", "minilm", version, "--repository", folder)
        with running_server(folder) as server:
            found[version] = vectors(server)
    assert (found[1] * found[2]).sum(1).max() < 0.999
    return found


def test_a_version_goes_live_under_load_and_back(
    repository: Path,
    server: Server,
    known: dict[int, Vectors],
    measured: Callable[..., None],
) -> None:
    old = memory(server, "minilm_encoder")
    with running_load(server, known) as load:
        for old_version, new in ((1, 2), (2, 1)):
            load.done.clear()
            began = time.monotonic()
            command = ("promote", "minilm", 2) if new == 2 else ("rollback", "minilm")
            arrowhead(*command, "--repository", repository)
            wait_until(lambda new=new: load.done and load.done[-1].version == new, "the change")
            measured(f"{command[0]} to live", time.monotonic() - began)
            seen = len(load.done)
            wait_until(lambda seen=seen: len(load.done) > seen + 100, "more load")
            assert load.failures() == []
            assert load.late(old_version, new) == []
            assert served_versions(server) == {"minilm": new}
            measured("in", len(load.done), "requests")
            measured("worst latency", load.worst_ms(), "ms")
            # Not before the old version's memory is free.
            wait_until(
                lambda new=new: set(server.stub_pids()) and loaded(server) == {new}, "unloading"
            )
        assert load.failures() == []
    assert server.restarts == []
    wait_until(lambda: not any(map(psutil.pid_exists, old)), "the end of the first process")
    measured("freed", sum(old.values()), "MB")


def test_a_gateway_follows_and_never_mixes(
    repository: Path, server: Server, known: dict[int, Vectors], measured: Callable[..., None]
) -> None:
    process, url = started(f"--url={server.grpc_url}")
    answered: list[tuple[float, float, int]] = []
    failed: list[str] = []
    stopping = threading.Event()

    def ask_on() -> None:
        with httpx.Client(base_url=url, timeout=30) as ask:
            for number in range(10**9):
                if stopping.is_set():
                    return
                # The first is remembered, the others are new, to Triton and to the gateway.
                texts = [TEXTS[0], *(text + " " * (number % 997 + 1) for text in TEXTS[1:])]
                sent = time.monotonic()
                answer = ask.post("/embed", json={"inputs": texts})
                if answer.status_code != 200:
                    failed.append(answer.text)
                    continue
                met = np.array(answer.json(), np.float32)
                near = {v: float((met * rows).sum(1).min()) for v, rows in known.items()}
                version = max(near, key=lambda v: near[v])
                if near[version] < 0.9999:
                    failed.append(f"no version's vectors, or of both: {near}")
                answered.append((sent, time.monotonic(), version))

    with ThreadPoolExecutor(2) as threads:
        try:
            runs = [threads.submit(ask_on) for _ in range(2)]
            wait_until(lambda: len(answered) > 20, "load")
            for command, new in (("promote", 2), ("rollback", 1)):
                answered.clear()
                began = time.monotonic()
                arrowhead(command, "minilm", *([2] if new == 2 else []), "--repository", repository)
                wait_until(lambda new=new: answered and answered[-1][2] == new, "the change")
                measured(f"{command} to live", time.monotonic() - began)
                wait_until(lambda new=new: loaded(server) == {new}, "unloading")
                seen = len(answered)
                wait_until(lambda seen=seen: len(answered) > seen + 20, "more load")
                first = min(end for _, end, version in answered if version == new)
                assert {v for sent, _, v in answered if sent > first} == {new}
                measured("worst latency", max(end - sent for sent, end, _ in answered) * 1e3, "ms")
        finally:
            stopping.set()
            [run.result() for run in runs]
            stopped(process)
    assert failed == []


def loaded(server: Server) -> set[int]:
    """The versions of the encoder that Triton has."""
    from arrowhead_server.probe import Pulse
    from arrowhead_server.repository import EmbeddingModel

    pulse = Pulse(server.address, (), 5.0)
    return {
        version
        for version in (1, 2, 3, 4)
        if pulse.has_loaded(EmbeddingModel("minilm", 384, version, "minilm"))
    }


def test_a_broken_version_is_refused_and_the_old_one_keeps_serving(
    repository: Path,
    server: Server,
    known: dict[int, Vectors],
    caplog: pytest.LogCaptureFixture,
) -> None:
    for part in ("minilm", "minilm_tokenizer", "minilm_encoder"):
        shutil.copytree(repository / part / "2", repository / part / "3")
    path = repository / "minilm_encoder" / "3" / "weights.parquet"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(bytes(raw))
    refusal = CliRunner().invoke(main, ["promote", "minilm", "--repository", str(repository)])
    assert refusal.exit_code == 1
    assert "was changed or damaged" in refusal.output
    assert pins.live(repository, "minilm") == 1
    # Somebody names it by hand.
    for part in ("minilm", "minilm_tokenizer", "minilm_encoder"):
        config = repository / part / "config.pbtxt"
        text = pins.with_versions(config.read_text(), [3])
        config.write_text(pins.with_pin(text, 3) if part == "minilm" else text)
    with running_load(server, known) as load:
        wait_until(lambda: "version 3 is refused" in caplog.text, "the refusal")
        wait_until(lambda: loaded(server) == {1}, "the withdrawal")
        seen = len(load.done)
        wait_until(lambda: len(load.done) > seen + 50, "more load")
    assert load.failures() == []
    assert {sent.version for sent in load.done} == {1}
    assert "was changed or damaged" in caplog.text
    assert caplog.text.count("version 3 is refused") == 1
    # Mended, it goes live without a restart.
    shutil.copy(repository / "minilm_encoder" / "2" / "weights.parquet", path)
    wait_until(lambda: served_versions(server) == {"minilm": 3}, "the mended version")
    wait_until(lambda: np.allclose(vectors(server), known[2], atol=1e-5), "its vectors")
    assert server.restarts == []


def test_a_conversion_while_it_serves_goes_live_without_a_restart(
    repository: Path, server: Server, tuned: Path, known: dict[int, Vectors]
) -> None:
    with running_load(server, known) as load:
        made = convert(str(tuned), "minilm", repository, progress=False)
        wait_until(lambda: served_versions(server) == {"minilm": made.version}, "the new version")
        wait_until(lambda: load.done and load.done[-1].version == 2, "its vectors")
        wait_until(lambda: loaded(server) == {made.version}, "unloading")
    assert load.failures() == []
    assert load.late(1, 2) == []
    assert server.restarts == []


def test_a_broken_live_version_fails_the_start_with_the_way_back(repository: Path) -> None:
    from arrowhead_server.errors import StartError

    arrowhead("promote", "minilm", 2, "--repository", repository)
    path = repository / "minilm_encoder" / "2" / "weights.parquet"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(StartError, match="arrowhead rollback minilm"), running_server(repository):
        pass
    arrowhead("rollback", "minilm", "--repository", repository)
    with running_server(repository) as server:
        assert served_versions(server) == {"minilm": 1}


def test_a_candidate_beside_the_live_version(
    repository: Path,
    server: Server,
    known: dict[int, Vectors],
    measured: Callable[..., None],
) -> None:
    arrowhead("promote", "minilm", "--candidate", "--repository", repository)
    both = {"minilm": 1, "minilm_candidate": 2}
    wait_until(lambda: served_versions(server) == both, "the candidate")
    with Client(server.http_url, model="minilm_candidate") as client:
        wait_until(client.ready, "the candidate in Triton")
    np.testing.assert_allclose(vectors(server), known[1], atol=1e-5)
    np.testing.assert_allclose(vectors(server, "minilm_candidate"), known[2], atol=1e-5)
    listed = arrowhead("models", "--repository", repository, "--url", server.http_url)
    rows = [line.split() for line in listed.splitlines()[1:]]
    assert [(row[1], row[2], row[-1]) for row in rows] == [
        ("1", "live", "serving"),
        ("2", "candidate", "serving"),
    ]
    before = {name: successes(server.metrics_url, name) for name in both}
    keys = [f"agent-{number}" for number in range(60)]
    for key in keys:
        experiment = Experiment(share=0.3, key=key)
        with Client(server.grpc_url, experiment=experiment) as client:
            met = client.embed(TEXTS)
        np.testing.assert_allclose(met, known[2 if in_candidate(key, 0.3) else 1], atol=1e-5)
    chosen = sum(in_candidate(key, 0.3) for key in keys)
    assert 8 <= chosen <= 28
    after = {name: successes(server.metrics_url, name) for name in both}
    assert {name: after[name] - before[name] for name in both} == {
        "minilm": len(keys) - chosen,
        "minilm_candidate": chosen,
    }
    measured("share in the metrics", 100 * chosen / len(keys), "%")
    candidates = memory(server, "minilm_encoder")
    arrowhead("rollback", "minilm", "--candidate", "--repository", repository)
    wait_until(lambda: served_versions(server) == {"minilm": 1}, "the end of the candidacy")
    wait_until(lambda: loaded(server) == {1}, "unloading")

    def ended() -> list[int]:
        return [pid for pid in candidates if not psutil.pid_exists(pid)]

    wait_until(ended, "the end of its process")
    assert len(ended()) == 1
    measured("freed", candidates[ended()[0]], "MB")
    np.testing.assert_allclose(vectors(server), known[1], atol=1e-5)
    assert server.restarts == []


def test_a_restart_after_a_crash_comes_back_with_what_was_live(
    repository: Path, server: Server, known: dict[int, Vectors]
) -> None:
    import os
    import signal

    arrowhead("promote", "minilm", 2, "--repository", repository)
    wait_until(lambda: served_versions(server) == {"minilm": 2}, "version 2")
    wait_until(lambda: loaded(server) == {2}, "unloading")
    os.kill(server.stub_pids()["minilm_encoder"][0], signal.SIGKILL)
    wait_until(lambda: len(server.restarts) == 1, "the restart")
    np.testing.assert_allclose(vectors(server), known[2], atol=1e-5)


class Apart(AsyncTransport):
    """Two replicas behind a balancer: one tells which version is live, the other gives vectors."""

    def __init__(self, tells: Server, gives: Server) -> None:
        self._tells, self._gives = (AsyncGrpcTransport(one.grpc_url) for one in (tells, gives))

    async def infer(self, request: Request, timeout_s: float) -> Answer:
        way = self._gives if request.model.endswith("_encoder") else self._tells
        return await way.infer(request, timeout_s)

    async def is_ready(self, model: str, timeout_s: float) -> bool:
        return await self._tells.is_ready(model, timeout_s)

    async def width(self, model: str, timeout_s: float) -> int:
        return await self._tells.width(model, timeout_s)

    async def config(self, model: str, timeout_s: float) -> Config:
        return await self._tells.config(model, timeout_s)

    async def close(self) -> None:
        await self._tells.close()
        await self._gives.close()


def test_replicas_of_two_versions_fail_nobody(
    prepared: Path, tmp_path: Path, known: dict[int, Vectors], measured: Callable[..., None]
) -> None:
    ahead, behind = (shutil.copytree(prepared, tmp_path / name) for name in ("ahead", "behind"))

    async def version(asking: Asking, number: int) -> int:
        answer = await asking.embed([text + " " * number for text in TEXTS], Options())
        near = {v: float((answer.vectors * rows).sum(1).min()) for v, rows in known.items()}
        return next(v for v, least in near.items() if least > 0.9999)

    async def turn(first: Server, second: Server) -> None:
        async with AsyncClient(transport=Apart(first, second), retries=2) as client:
            old = Asking(client)
            assert await version(old, 1) == 1
            watching = asyncio.create_task(old.watch())
            await asyncio.to_thread(arrowhead, "promote", "minilm", 2, "--repository", ahead)
            while (live := old.live) is None or live.version == 1:
                await asyncio.sleep(0.05)
            # The first says 2, and the second has only 1, which this gateway has asked before.
            assert [await version(old, number) for number in range(2, 6)] == [1] * 4
            # One that has never asked for 1 waits until the second has followed.
            new = asyncio.create_task(version(Asking(client), 6))
            began = time.monotonic()
            await asyncio.to_thread(arrowhead, "promote", "minilm", 2, "--repository", behind)
            assert await new == 2
            measured("waited", time.monotonic() - began)
            assert await version(old, 7) == 2
            watching.cancel()

    with running_server(ahead) as first, running_server(behind) as second:
        asyncio.run(turn(first, second))
