# SPDX-License-Identifier: Apache-2.0
"""A process that stood still ends before it answers; one that was only busy, or idle, answers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from arrowhead_engine.stillness import EXIT_CODE, STILL_S, WAKING_S, Beat, still

# Answers lines: each is computed by what it says, as a model computes a batch.
PROCESS = """
import sys, time
from arrowhead_engine.stillness import Stillness

real = time.time
stillness = Stillness(lambda level, message: print(level, message, file=log))
log = sys.stderr
print("ready", flush=True)
for line in sys.stdin:
    began = time.perf_counter()
    print("begun", flush=True)
    exec(line)
    stillness.check(began)
    print("answered", flush=True)
stillness.close()
"""
LONG_S = 4 * STILL_S


@pytest.fixture
def process() -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", PROCESS]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            assert said(process) == "ready"
            yield process
        finally:
            process.kill()


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def ask(process: subprocess.Popen[str], work: str) -> None:
    assert process.stdin is not None
    process.stdin.write(f"{work}\n")
    process.stdin.flush()


def stand_still(process: subprocess.Popen[str], meanwhile: Callable[[], object]) -> None:
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(LONG_S / 2)
    meanwhile()
    time.sleep(LONG_S / 2)
    os.kill(process.pid, signal.SIGCONT)


def ended(process: subprocess.Popen[str]) -> str:
    """What it logged, having ended for this reason and answered nothing."""
    out, log = process.communicate(timeout=60)
    assert "answered" not in out
    assert process.returncode == EXIT_CODE
    return log


def test_a_batch_in_which_it_stood_still_is_not_answered(process: subprocess.Popen[str]) -> None:
    ask(process, "time.sleep(0.3)")
    assert said(process) == "begun"
    stand_still(process, lambda: None)
    log = ended(process)
    assert log.startswith("warning this process stood still for ")
    assert LONG_S <= float(log.split()[6]) < LONG_S + 30.0


def test_nor_is_one_that_was_sent_while_it_stood_still(process: subprocess.Popen[str]) -> None:
    ask(process, "pass")
    assert [said(process), said(process)] == ["begun", "answered"]
    stand_still(process, lambda: ask(process, "pass"))
    ended(process)


def test_nor_one_in_which_the_clock_that_triton_waits_by_jumped(
    process: subprocess.Popen[str],
) -> None:
    ask(process, "time.time = lambda: real() + 30")
    ended(process)


def test_nor_where_that_cannot_be_told(process: subprocess.Popen[str]) -> None:
    ask(process, "log = open('/dev/full', 'w', buffering=1); time.sleep(0.3)")
    assert said(process) == "begun"
    stand_still(process, lambda: None)
    assert ended(process) == ""


def test_one_that_is_sent_later_is(process: subprocess.Popen[str]) -> None:
    stand_still(process, lambda: None)
    time.sleep(3 * WAKING_S)
    ask(process, "pass")
    assert [said(process), said(process)] == ["begun", "answered"]


def test_one_that_takes_long_is(process: subprocess.Popen[str]) -> None:
    ask(process, "while time.perf_counter() < began + 3: pass")
    assert [said(process), said(process)] == ["begun", "answered"]


def test_so_is_one_that_waits_long(process: subprocess.Popen[str]) -> None:
    ask(process, "time.sleep(3)")  # as for a GPU: Python's lock is free
    assert [said(process), said(process)] == ["begun", "answered"]


def test_time_at_work_is_not_time_of_standing_still() -> None:
    # In one call that keeps Python's lock, so that the thread that watches gets no turn.
    began, later = Beat(10.0, 1000.0, 1.0), Beat(13.0, 1003.0, 3.75)
    assert still(began, later) == 0.25
