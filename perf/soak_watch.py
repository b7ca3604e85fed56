# SPDX-License-Identifier: Apache-2.0
"""Watches the processes of a stack from outside: memory, handles, threads, shared memory, CPU."""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from deploy.stack import Stack
from perf.machine import busy_percent
from perf.server import descendants, role_of
from perf.soak_results import Event, Life

_STAT = Path("/proc/stat")
_SHM = Path("/dev/shm")  # noqa: S108 (where POSIX shared memory lives on Linux)


@dataclass(frozen=True)
class Process:
    """One process at one moment.

    Attributes:
        part: of the stack, as `triton1`.
        role: what it is there, as `tritonserver`, or a model's name for its Python process.
        private_mb: memory that is its own, heap and stacks: what a leak grows. MB are 10^6 bytes.
        handles: open files, sockets and pipes.
        cpu_s: seconds that it has worked.
    """

    part: str
    role: str
    pid: int
    rss_mb: float
    pss_mb: float
    private_mb: float
    handles: int
    threads: int
    cpu_s: float


@dataclass(frozen=True)
class Moment:
    """Everything at one moment.

    Attributes:
        at_s: seconds since the watch began.
        shm_files, shm_mb: in /dev/shm, of this stack's Tritons.
        other_work: percent of all cores that others worked since the moment before.
    """

    at_s: float
    processes: list[Process]
    shm_files: int
    shm_mb: float
    other_work: float

    @property
    def pss_mb(self) -> float:
        """Of all processes together."""
        return sum(process.pss_mb for process in self.processes)

    def held(self, field: str) -> dict[str, float]:
        """One of the figures by role, added up over its processes."""
        found: dict[str, float] = {}
        for process in self.processes:
            found[process.role] = found.get(process.role, 0.0) + float(getattr(process, field))
        return found


@dataclass(frozen=True)
class History:
    """What was seen while the load was on.

    Attributes:
        moments: all looks, in order.
        latencies: of each kind of request, in ms, by when they were answered.
        events: what was done to the stack.
    """

    moments: list[Moment]
    latencies: dict[str, Life]
    events: list[Event]


class Watch:
    """Looks at a stack whenever it is told to; not from two threads at once.

    Attributes:
        began: where its seconds begin, by time.monotonic().
    """

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self.began = time.monotonic()
        self._seen: set[psutil.Process] = set()
        self._prefixes: set[str] = set()
        self._busy = _STAT.read_text(encoding="ascii")
        self._cpu = self._worked({}, time.monotonic())

    def look(self) -> Moment:
        """Everything now."""
        now, busy = time.monotonic(), _STAT.read_text(encoding="ascii")
        processes = [one for part in self._stack.names for one in self._of(part)]
        files = self._shared_memory()
        sizes = [_size(file) for file in files]
        before, self._cpu = (
            self._cpu,
            self._worked({process.pid: process.cpu_s for process in processes}, now),
        )
        moment = Moment(
            at_s=now - self.began,
            processes=processes,
            shm_files=len(files),
            shm_mb=sum(sizes) / 1e6,
            other_work=max(busy_percent(self._busy, busy) - _percent(before, self._cpu), 0.0),
        )
        self._busy = busy
        return moment

    @property
    def now_s(self) -> float:
        """Seconds since it began."""
        return time.monotonic() - self.began

    def left(self) -> list[str]:
        """What is still there of all that was ever seen: processes, files of shared memory."""
        alive = [process for process in self._seen if process.is_running()]
        return [*map(str, alive), *map(str, self._shared_memory())]

    def _shared_memory(self) -> list[Path]:
        """The files in /dev/shm that this stack's Tritons, of now or before, have made."""
        return [file for prefix in self._prefixes for file in _SHM.glob(f"{prefix}*")]

    def _of(self, part: str) -> list[Process]:
        root = self._stack.pid(part)
        if not root:
            return []
        if part in self._stack.tritons:
            self._prefixes.add(f"arrowhead-{root}-")
        found = []
        for pid in [root, *descendants(root)]:
            role = _ROOTS.get(part.rstrip("123456789"), part) if pid == root else role_of(pid)
            with contextlib.suppress(OSError, psutil.Error, KeyError):  # it ended meanwhile
                process = psutil.Process(pid)
                self._seen.add(process)
                found.append(_process(part, role, process))
        return found

    def _worked(self, worked: dict[int, float], now: float) -> tuple[dict[int, float], float]:
        own = os.times()
        return {**worked, os.getpid(): own.user + own.system}, now


_ROOTS = {"triton": "arrowhead serve", "gateway": "arrowhead gateway"}


def lives(moments: list[Moment], role: str, field: str) -> list[Life]:
    """One figure of each process that had that role."""
    found: dict[int, list[tuple[float, float]]] = {}
    for moment in moments:
        for process in moment.processes:
            if process.role == role:
                found.setdefault(process.pid, []).append(
                    (moment.at_s, float(getattr(process, field)))
                )
    return [Life(*np.array(points).T) for points in found.values()]


def _percent(
    before: tuple[dict[int, float], float], after: tuple[dict[int, float], float]
) -> float:
    """Of all cores, that these processes worked."""
    worked = sum(seconds - before[0].get(pid, 0.0) for pid, seconds in after[0].items())
    return 100 * worked / max((after[1] - before[1]) * (os.cpu_count() or 1), 1e-9)


def _process(part: str, role: str, seen: psutil.Process) -> Process:
    rollup = Path(f"/proc/{seen.pid}/smaps_rollup").read_text(encoding="ascii")
    kib = dict(line.split(":", 1) for line in rollup.splitlines()[1:])
    rss, pss, private = (
        int(kib[key].split()[0]) * 1024 / 1e6 for key in ("Rss", "Pss", "Anonymous")
    )
    with seen.oneshot():
        handles, threads, times = seen.num_fds(), seen.num_threads(), seen.cpu_times()
    worked = times.user + times.system
    return Process(part, role, seen.pid, rss, pss, private, handles, threads, worked)


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0
