# SPDX-License-Identifier: Apache-2.0
"""The command: all targets in turn, each in a process that may crash, fill memory, or hang."""

from __future__ import annotations

import json
import re
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import psutil
from tqdm import tqdm

from perf.common import Run, common_options, end_as_ctrl_c_does, last_line
from perf.fuzz import page, schema
from perf.fuzz.target import Target
from perf.fuzz.targets import TARGETS
from perf.fuzz.worker import has_atheris
from perf.machine import ROOT, Bystanders, describe
from perf.stats import Sample

MOST_MB = 3072  # resident memory of a target's process; torch and MiniLM take 700 of it
HANG_S = 60.0  # for one input
_START_S = 600.0  # a busy machine imports torch and transformers for minutes
_LOOK_S = 0.5
_MOST_ENDS = 5  # of a target's process, before its time is over
_EDGES = re.compile(r"\bcov: (\d+)")


@dataclass(frozen=True)
class Fault:
    """An input that was one.

    Attributes:
        what: the error and where it was raised, or how the process ended.
        message: what the error says.
        input: the input, as Python writes it.
    """

    what: str
    message: str
    input: str


@dataclass(frozen=True)
class Fuzzed:
    """What came of one target.

    Attributes:
        tool: what chose the inputs.
        inputs: how many were tried.
        seconds: for so long, starts included.
        edges: of Arrowhead's code, that were reached; None where it runs in other processes.
        replayed: inputs that were faults once, among those that were tried.
        faults: one of each place.
    """

    name: str
    wanted: str
    tool: str
    inputs: int
    seconds: float
    edges: int | None
    replayed: int
    faults: list[Fault]


@dataclass(frozen=True)
class FuzzResults(Run):
    """All of it."""

    minutes: float
    versions: dict[str, str]
    targets: list[Fuzzed]


@click.command(
    epilog="Example: python -m perf.fuzz --minutes 10 --only encoder --repository model_repository"
)
@click.option("--quick", is_flag=True, help="Ten seconds a target, to see it work.")
@click.option(
    "--minutes", type=click.FloatRange(min=0.05), default=5.0, show_default=True, help="A target."
)
@click.option(
    "--only",
    multiple=True,
    type=click.Choice([*TARGETS, schema.NAME]),
    help="Such a target only; may be given several times.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Another one, other inputs.")
@common_options
def main(
    quick: bool, minutes: float, only: Sequence[str], seed: int, repository: Path, out: Path
) -> None:
    """Give hostile input to everything that reads what strangers send.

    Ends with status 1 if there were faults.
    """
    end_as_ctrl_c_does()
    began, machine, others = time.monotonic(), describe(), Bystanders()
    seconds = 10.0 if quick else 60 * minutes
    found = []
    for name in only or [*TARGETS, schema.NAME]:
        others.look()
        with tempfile.TemporaryDirectory(prefix="arrowhead-fuzz-") as folder:
            if name == schema.NAME:
                found.append(_by_schema(repository.resolve(), Path(folder), seconds))
            else:
                work = _Work(TARGETS[name], Path(folder), repository.resolve(), seed)
                found.append(work.fuzz(seconds))
        click.echo(page.line(found[-1]), err=True)
    results = FuzzResults(
        machine=machine,
        quick=quick,
        seconds=time.monotonic() - began,
        other_work=Sample.of(others.percent),
        minutes=seconds / 60,
        versions=page.versions(),
        targets=found,
    )
    out.mkdir(parents=True, exist_ok=True)
    (out / "fuzz.json").write_text(results.to_json(), encoding="utf-8")
    (out / "fuzz.md").write_text(page.page(results), encoding="utf-8")
    click.echo(f"{results.seconds:.0f} s; {out / 'fuzz.md'}")
    if any(one.faults for one in found):
        sys.exit(1)


def _by_schema(repository: Path, folder: Path, seconds: float) -> Fuzzed:
    began = time.monotonic()
    click.echo(schema.NAME, err=True)
    inputs, faults = schema.run(repository, folder, seconds)
    return Fuzzed(
        schema.NAME,
        schema.WANTED,
        "Schemathesis",
        inputs,
        time.monotonic() - began,
        None,
        0,
        [Fault(**fault) for fault in faults],
    )


class _Work:
    """Fuzzes a target, in one process after the other if they end too early."""

    def __init__(self, target: Target, folder: Path, repository: Path, seed: int) -> None:
        self._target, self._folder, self._repository = target, folder, repository
        self._seed = seed
        self._inputs, self._spent = 0, 0.0
        self._edges: int | None = None
        self._ended: list[Fault] = []

    def fuzz(self, seconds: float) -> Fuzzed:
        """For so long."""
        target, began = self._target, time.monotonic()
        guided = [target.name] if target.guided else []
        (self._folder / "guided").write_text(json.dumps(guided))
        form = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s {postfix}"
        with tqdm(total=seconds, desc=target.name, bar_format=form, disable=None) as bar:
            while seconds - self._spent > 1 and len(self._ended) < _MOST_ENDS:
                self._spent += max(self._one_process(seconds - self._spent, bar), 1.0)
        lines = self._folder / "faults.jsonl"
        noted = lines.read_text(encoding="utf-8").splitlines() if lines.exists() else []
        return Fuzzed(
            target.name,
            target.wanted,
            "atheris" if target.guided and has_atheris() else "Hypothesis",
            self._inputs,
            time.monotonic() - began,
            self._edges,
            len(target.found),
            [*self._ended, *(Fault(**json.loads(line)) for line in noted)],
        )

    def _one_process(self, seconds: float, bar: tqdm[Any]) -> float:
        """Starts one and watches it; how long it was at work."""
        command = [sys.executable, "-m", "perf.fuzz.worker", self._target.name, str(self._folder)]
        command += [str(seconds), str(self._seed), str(self._repository)]
        self._seed += 1_000_000
        began, first, moved, tried, wrong = time.monotonic(), 0.0, 0.0, 0, ""
        log = self._folder / "log"
        with log.open("wb") as said:
            process = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=said, stderr=said
            )
            try:
                while process.poll() is None and not wrong:
                    time.sleep(_LOOK_S)
                    now, before = time.monotonic(), tried
                    tried = self._progress()
                    if tried > before:
                        first, moved = first or now, now
                        bar.set_postfix(inputs=self._inputs + tried, faults=self._known())
                        bar.update(self._spent + min(now - first, seconds) - bar.n)
                    if tried and now - moved > HANG_S:
                        wrong = f"one input takes more than {HANG_S:.0f} s"
                    elif not tried and now - began > _START_S:
                        wrong = f"not begun after {_START_S:.0f} s"
                    elif _resident_mb(process.pid) > MOST_MB:
                        wrong = f"more than {MOST_MB} MB"
            finally:
                process.kill()
                status = process.wait()
        tried = self._progress()
        text = log.read_text(encoding="utf-8", errors="replace")
        if edges := _EDGES.findall(text):
            self._edges = max(int(edges[-1]), self._edges or 0)
        self._inputs += tried
        if not wrong and status < 0:
            wrong = f"ended by {signal.Signals(-status).name}"
        elif not wrong and status:
            wrong = f"ended with status {status}"
        if wrong:
            self._ended.append(Fault(wrong, last_line(text)[:500], self._input()))
        return time.monotonic() - (first or began)

    def _progress(self) -> int:
        with suppress(OSError, struct.error):
            return int(struct.unpack("<q", (self._folder / "progress").read_bytes())[0])
        return 0

    def _input(self) -> str:
        """The one of the moment."""
        with suppress(OSError):
            raw = (self._folder / "input").read_bytes()
            return raw.partition(b"\0")[0].decode("utf-8", "replace")
        return ""

    def _known(self) -> int:
        lines = self._folder / "faults.jsonl"
        return lines.read_bytes().count(b"\n") if lines.exists() else 0


def _resident_mb(pid: int) -> float:
    with suppress(psutil.NoSuchProcess):
        return float(psutil.Process(pid).memory_info().rss / 1e6)
    return 0.0
