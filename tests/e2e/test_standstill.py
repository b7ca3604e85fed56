# SPDX-License-Identifier: Apache-2.0
"""A server that is paused for a moment, again and again, never answers with another's vectors."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from arrowhead_client import ArrowheadError, Client
from arrowhead_server.supervisor import running_server
from perf.faults_load import Known, Requests
from perf.faults_scenes import standing_still

PAUSES = 5
# Triton gives a model's process up that showed no life for a second; it shows it every 300 ms.
PAUSE_S = 1.2
CALLERS = 4


@pytest.mark.timeout(600)
def test_no_vector_is_another_texts(
    minilm_repository: Path,
    caplog: pytest.LogCaptureFixture,
    measured: Callable[..., None],
) -> None:
    known = Known(minilm_repository, [1])
    requests, lock, over = Requests(known), threading.Lock(), threading.Event()
    answers: list[int] = []  # the version whose vectors came, 0 if it is nobody's

    def call(url: str) -> None:
        with Client(url, retries=0, timeout_s=30.0) as client:
            while not over.is_set():
                with lock:
                    places, texts = requests.next()
                try:
                    answers.append(known.version(places, client.embed(texts, progress=False)))
                except ArrowheadError:
                    time.sleep(0.05)  # Triton gave it up, or is being started again

    with running_server(minilm_repository) as server:
        callers = [threading.Thread(target=call, args=(server.grpc_url,)) for _ in range(CALLERS)]
        for caller in callers:
            caller.start()
        try:
            for _ in range(PAUSES):
                answered = len(answers)
                deadline = time.monotonic() + 60.0
                while len(answers) < answered + 50:  # it answers (again)
                    assert time.monotonic() < deadline
                    time.sleep(0.02)
                pause(server.pid)
        finally:
            over.set()
            for caller in callers:
                caller.join()
    measured("answers", len(answers), "")
    assert set(answers) == {1}
    assert "this process stood still" in caplog.text


def pause(triton: int) -> None:
    """Triton and its models' processes stop, and go on, Triton first."""
    process = psutil.Process(triton)
    processes = [process, *process.children(recursive=True)]
    with standing_still(processes, is_last_first=False):
        time.sleep(PAUSE_S)
