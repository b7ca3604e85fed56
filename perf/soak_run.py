# SPDX-License-Identifier: Apache-2.0
"""One soak of a stack that runs: its phases, what is done to it, and what comes of that."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import click
import numpy as np
import psutil
from tqdm import tqdm

from arrowhead_client import ArrowheadError, AsyncClient
from deploy.stack import Stack
from perf.common import end_as_ctrl_c_does, last_line
from perf.machine import Machine
from perf.server import MODEL
from perf.soak_load import Callers, Tally, TextPool
from perf.soak_results import (
    OF_ALL,
    OF_PROCESSES,
    Drift,
    Event,
    Failure,
    Life,
    Of,
    Rest,
    SoakResults,
    Trend,
    trend,
)
from perf.soak_watch import History, Moment, Watch, lives
from perf.stats import Sample

SHARE = 0.55  # of what the stack can do at most
_MOST_FAILED = 20  # then it ends early
_RECOVERY_S = 60.0
_REMEMBERED = 10_000  # texts, by each gateway
_LOOK_S = 0.2
_LOOKS_AT_REST = 8
_ROLES = (
    "arrowhead serve", "janitor", "tritonserver", f"{MODEL}_tokenizer", f"{MODEL}_encoder",
    "arrowhead gateway", "haproxy",
)  # fmt: skip
_BORN_S = 5.0  # who is seen earlier is older than the load
_UNLOADED_S = 10.0  # after a version went live, the old one's processes end
_GONE_S = 5.0
# More may be held by a process after the load than before. HAProxy keeps connections for the next
# request; a model's process that starts while Triton listens inherits Triton's open sockets; a
# gateway's threads for long texts, that asyncio starts when it needs them, stay.
_ALLOWED = {
    ("threads", "arrowhead gateway"): min(32.0, (os.cpu_count() or 1) + 4.0),
    ("handles", "haproxy"): 8.0,
    ("handles", "tritonserver"): 8.0,
    ("threads", "tritonserver"): 8.0,
    ("handles", f"{MODEL}_tokenizer"): 32.0,
    ("handles", f"{MODEL}_encoder"): 32.0,
}


@dataclass(frozen=True)
class Effort:
    """How long everything takes, in seconds.

    Attributes:
        peak_s: of the measurement of what can be done at most.
        rest_s: between the last request and the look at what is held.
        load_s: of the load.
        sample_s: between two looks at the processes; latencies are of intervals as long.
        warm_up_s: of each process, that says nothing about its slope.
        first_swap_s, swap_s: until a new version goes live, and between two such.
        first_kill_s, kill_s: the same of killed processes.
        refill_s: until the response cache of a new Triton is full again.
        remember_s: until a gateway's memory is full again after a swap.
    """

    peak_s: float
    rest_s: float
    load_s: float
    sample_s: float
    warm_up_s: float
    first_swap_s: float
    swap_s: float
    first_kill_s: float
    kill_s: float
    refill_s: float
    remember_s: float

    @classmethod
    def of(cls, minutes: float) -> Effort:
        """A soak of so many minutes."""
        return cls(
            peak_s=20,
            rest_s=20,
            load_s=60 * minutes,
            sample_s=5,
            warm_up_s=60,
            first_swap_s=150,
            swap_s=720,
            first_kill_s=420,
            kill_s=600,
            refill_s=900,
            remember_s=480,
        )


QUICK = Effort(
    peak_s=3,
    rest_s=6,
    load_s=30,
    sample_s=0.5,
    warm_up_s=4,
    first_swap_s=2,
    swap_s=1000,
    first_kill_s=23,
    kill_s=1000,
    refill_s=1000,
    remember_s=4,
)


@dataclass(frozen=True)
class Done:
    """Something that was done to the stack, and how to tell that it is over."""

    kind: Literal["swap", "kill"]
    what: str
    is_over: Callable[[], Awaitable[bool]]


class Lost(Exception):
    """Something that a soak must not lose: it ends here."""


class Soak:
    """Runs once.

    Args:
        stack: is up.
        models: its repository, which is ours to change.
        versions: of the model there; the first one is live.
        known: texts with their vectors.

    Attributes:
        history: what was seen, moment by moment.
    """

    def __init__(
        self,
        stack: Stack,
        models: Path,
        versions: tuple[int, int],
        known: TextPool,
        effort: Effort,
    ) -> None:
        self._stack, self._models, self._versions = stack, models, versions
        self._known, self._effort = known, effort
        self._watch = Watch(stack)
        self.history = History([], {}, [])
        self._rests: list[list[Moment]] = []
        self._tally = Tally()
        self._peak = 0.0
        self._load_s = 0.0
        self._lost = ""

    async def run(self) -> None:
        """All phases that need the stack.

        Raises:
            Lost: something was lost before the load began.
        """
        _say("filling what remembers texts")
        async with Callers(self._stack, self._known) as callers:
            await callers.fill(_REMEMBERED * self._stack.gateways)
            _say("what the stack can do at most")
            self._peak = await callers.at_most(self._effort.peak_s)
        if callers.tally.failed:
            raise Lost(f"before the load began: {dict(callers.tally.failures)}")
        _say(f"{self._peak:.0f} operations a second; at rest")
        self._rests.append(await self._rest())
        async with Callers(self._stack, self._known) as callers:
            self._tally = callers.tally
            await self._load(callers)
        _say("at rest")
        self._rests.append(await self._rest())

    async def _rest(self) -> list[Moment]:
        """Several looks: HAProxy asks now and then how Tritons are, and a thread answers it."""
        await asyncio.sleep(self._effort.rest_s)
        moments = []
        for _ in range(_LOOKS_AT_REST):
            moments.append(await asyncio.to_thread(self._watch.look))
            await asyncio.sleep(_LOOK_S)
        return moments

    async def _load(self, callers: Callers) -> None:
        stop = asyncio.Event()
        self._watch.began = time.monotonic()
        work = [
            callers.offer(self._peak * SHARE, stop),
            self._repeated(self._effort.first_swap_s, self._effort.swap_s, self._swap, stop),
            self._repeated(self._effort.first_kill_s, self._effort.kill_s, self._kill, stop),
            self._looks(stop),
        ]
        with self._ended_by_signals(stop):
            await asyncio.gather(*work)
        self._load_s = self._watch.now_s
        for kind, answers in callers.tally.ms.items():
            at_s, ms = np.array(answers).T
            self.history.latencies[kind] = Life(at_s - self._watch.began, ms)

    @contextlib.contextmanager
    def _ended_by_signals(self, stop: asyncio.Event) -> Iterator[None]:
        """Has Ctrl-C and SIGTERM end the load, so that what was found is told."""

        def end() -> None:
            self._lose("it was interrupted", stop)

        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, end)
        try:
            yield
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            end_as_ctrl_c_does()

    def _lose(self, why: str, stop: asyncio.Event) -> None:
        self._lost = self._lost or f"after {self._watch.now_s:.0f} s: {why}"
        stop.set()

    async def _looks(self, stop: asyncio.Event) -> None:
        """Samples and shows the progress; ends the load when it is over, or all is lost."""
        whole = self._effort.load_s
        with tqdm(total=round(whole), unit="s", desc="load", disable=None) as bar:
            while not stop.is_set():
                self.history.moments.append(await asyncio.to_thread(self._watch.look))
                bar.update(min(round(self._watch.now_s), round(whole)) - bar.n)
                bar.set_postfix(
                    answered=sum(self._tally.answered.values()), failed=self._tally.failed
                )
                if self._tally.wrong:
                    self._lose(f"a wrong vector: {self._tally.wrong[0]}", stop)
                elif self._tally.failed > _MOST_FAILED:
                    self._lose(f"{self._tally.failed} requests have failed", stop)
                elif self._watch.now_s >= whole:
                    stop.set()
                await _sleep(self._effort.sample_s, stop)

    async def _repeated(
        self,
        first_s: float,
        every_s: float,
        do: Callable[[int], Awaitable[Done]],
        stop: asyncio.Event,
    ) -> None:
        """Does something to the stack now and then, and waits until that is over."""
        await _sleep(first_s, stop)
        number = 0
        while not stop.is_set():
            at_s, took_s = self._watch.now_s, None
            try:
                done = await do(number)
            except Lost as error:
                self._lose(str(error), stop)
                return
            while took_s is None and self._watch.now_s - at_s < _RECOVERY_S:
                await asyncio.sleep(_LOOK_S)
                if await done.is_over():
                    took_s = self._watch.now_s - at_s
            self.history.events.append(Event(at_s, done.kind, done.what, took_s))
            if took_s is None:
                self._lose(f"{done.what}: not over within {_RECOVERY_S:.0f} s", stop)
            number += 1
            await _sleep(every_s - (self._watch.now_s - at_s), stop)

    async def _swap(self, number: int) -> Done:
        """The other version goes live."""
        version = self._versions[(number + 1) % 2]
        arguments = ["rollback", MODEL] if number % 2 else ["promote", MODEL, str(version)]
        process = await asyncio.create_subprocess_exec(
            str(Path(sys.executable).with_name("arrowhead")),
            *arguments,
            f"--repository={self._models}",
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
        said = (await process.communicate())[1].decode()
        what = f"{arguments[0]} to version {version}"
        if process.returncode:
            raise Lost(f"{what}: {last_line(said)}")

        async def is_over() -> bool:
            for name in self._stack.tritons:
                async with AsyncClient(f"grpc://{self._stack.address(name)}:8001") as client:
                    with contextlib.suppress(ArrowheadError):
                        if (await client.info()).version == version:
                            continue
                return False
            return True

        return Done("swap", what, is_over)

    async def _kill(self, number: int) -> Done:
        """A model's process dies. Always of the same Triton: the others grow old."""
        part = self._stack.tritons[-1]
        role = (f"{MODEL}_encoder", f"{MODEL}_tokenizer")[number % 2]
        before = {
            process.role: process.pid
            for process in self.history.moments[-1].processes
            if process.part == part
        }
        if not {role, "tritonserver"} <= before.keys():
            raise Lost(f"{part} has no {role}: {sorted(before)}")
        with contextlib.suppress(ProcessLookupError):  # replaced since the last look
            os.kill(before[role], signal.SIGKILL)

        async def is_over() -> bool:
            # `arrowhead serve` starts all of that Triton anew.
            return not psutil.pid_exists(before["tritonserver"]) and await asyncio.to_thread(
                self._stack.is_ready, part
            )

        return Done("kill", f"killed {role} of {part}", is_over)

    def results(
        self, machine: Machine, quick: bool, seconds: float, left: list[str]
    ) -> SoakResults:
        """What came of it all, after the stop."""
        tally, moments = self._tally, self.history.moments
        return SoakResults(
            machine=machine,
            quick=quick,
            seconds=seconds,
            other_work=Sample.of([moment.other_work for moment in moments[1:]] or [0.0]),
            replicas=self._stack.replicas,
            gateways=self._stack.gateways,
            peak=self._peak,
            load_s=self._load_s,
            answered=dict(tally.answered),
            vectors=tally.vectors,
            wrong=tally.wrong,
            refused=dict(tally.refused),
            hung_up=tally.hung_up,
            failures=[Failure(*what, count) for what, count in tally.failures.items()],
            skipped_s=tally.skipped_s,
            trends=self._trends(),
            rest=self._at_rest(),
            drifts=[_drift(kind, life) for kind, life in sorted(self.history.latencies.items())],
            events=self.history.events,
            left=left,
            lost=self._lost,
        )

    def left_behind(self) -> list[str]:
        """What is still there after the stop; processes have a moment to go."""
        ends = time.monotonic() + _GONE_S
        while (left := self._watch.left()) and time.monotonic() < ends:
            time.sleep(_LOOK_S)
        return left + [str(folder) for folder in (self._stack.folder,) if folder.exists()]

    def _trends(self) -> list[Trend]:
        moments = self.history.moments
        if not moments:
            return []
        by_role = [
            trend(
                Of(quantity, role),
                self._lives(role, quantity.field),
                warm_up_s=self._effort.warm_up_s,
                processes=_count(moments[-1], role),
            )
            for quantity in OF_PROCESSES
            for role in _ROLES
        ]
        calm = [moment for moment in moments if not self._is_changing(moment.at_s)]
        at_s = np.array([moment.at_s for moment in calm])
        whole = [
            trend(
                Of(quantity, "all"),
                [Life(at_s, np.array([float(getattr(moment, quantity.field)) for moment in calm]))],
                warm_up_s=self._effort.warm_up_s,
            )
            for quantity in OF_ALL
        ]
        return by_role + whole

    def _lives(self, role: str, field: str) -> list[Life]:
        """Of who remembers texts, only when his memory is full again.

        A Triton that was started anew has an empty response cache, and to a gateway a new version
        is one of which it knows no vector.
        """
        found = lives(self.history.moments, role, field)
        if role == "arrowhead gateway":
            swaps = [event.at_s for event in self.history.events if event.kind == "swap"]
            cut = [piece for life in found for piece in life.cut(swaps)]
            return [
                piece if piece.at_s[0] < _BORN_S else piece.warm(self._effort.remember_s)
                for piece in cut
            ]
        if role != "tritonserver":
            return found
        return [
            life if life.at_s[0] < _BORN_S else life.warm(self._effort.refill_s) for life in found
        ]

    def _is_changing(self, at_s: float) -> bool:
        """Whether processes come and go: a new version has some of its own while it loads."""
        return any(
            event.at_s <= at_s <= event.at_s + (event.took_s or _RECOVERY_S) + _UNLOADED_S
            for event in self.history.events
        )

    def _at_rest(self) -> list[Rest]:
        if len(self._rests) < 2:
            return []
        before, after = self._rests
        of_roles = [Of(quantity, role) for quantity in OF_PROCESSES[1:] for role in _ROLES]
        of_all = [Of(quantity, "all") for quantity in OF_ALL[1:]]
        return [
            Rest(
                of,
                _held(before, of),
                _held(after, of),
                allowed=_ALLOWED.get((of.quantity.field, of.role), 0.0)
                * _count(after[-1], of.role),
            )
            for of in of_roles + of_all
        ]


def _held(looks: list[Moment], of: Of) -> float:
    """The least that was seen in one of the looks."""
    field, role = of.quantity.field, of.role
    if role == "all":
        return min(float(getattr(moment, field)) for moment in looks)
    return min(moment.held(field).get(role, 0.0) for moment in looks)


def _count(moment: Moment, role: str) -> int:
    return sum(process.role == role for process in moment.processes)


def _drift(kind: str, life: Life) -> Drift:
    """First and last third, by the moments when they were answered."""
    thirds = life.at_s.min() + np.ptp(life.at_s) * np.array([1 / 3, 2 / 3])
    first, last = life.values[life.at_s <= thirds[0]], life.values[life.at_s >= thirds[1]]
    return Drift(
        kind,
        len(life.values),
        *(float(np.percentile(some, share)) for share in (50, 99) for some in (first, last)),
    )


async def _sleep(seconds: float, stop: asyncio.Event) -> None:
    """Until then, or until told to stop."""
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(stop.wait(), max(seconds, 0))


def _say(step: str) -> None:
    click.echo(step, err=True)
