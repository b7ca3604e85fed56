# SPDX-License-Identifier: Apache-2.0
"""`python -m perf.profile`: where the time of a request goes, and how it grows, as a page.

1. Where the time goes: the caller, Triton's stages, tokenizer and encoder by themselves.
2. What a token costs by batch, length and model size.
3. Short texts while long ones are served.
4. Repeated texts.
5. Several processes of the encoder.

The server comes first; what is timed in this process, which may import torch, last.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from arrowhead_engine.compute import choose
from perf import profile_page, profile_plots, scaling
from perf.common import common_options, end_as_ctrl_c_does
from perf.copies import with_no_op
from perf.machine import Bystanders, describe
from perf.profile_load import Latency, LoadFailed
from perf.profile_results import ProfileResults
from perf.profile_server import (
    MOST_TEXTS,
    Instances,
    Line,
    Repeated,
    head_of_line,
    instances,
    repeated_texts,
)
from perf.profile_time import (
    LOADED_CLIENTS,
    Inside,
    Overhead,
    Seen,
    TimeResults,
    overhead,
    see,
    take_apart,
    through_client,
)
from perf.server import Served, ServeFailed, served
from perf.stats import Sample
from perf.texts import Texts

PARTS = ("time", "scaling", "line", "repeated", "instances")


@dataclass(frozen=True)
class Effort:
    """How much of everything.

    Attributes:
        passes, load_s: runs of each load, and seconds of each.
        largest: texts in the largest request that stands in the way of short ones.
        line_s, repeated_s: seconds of those loads.
        counts: of encoder processes.
        rounds: batches timed in this process.
        scaling: turns of each shape, milliseconds of each, most seconds altogether, sizes.
    """

    passes: int
    load_s: float
    largest: int
    line_s: float
    repeated_s: float
    counts: Sequence[int]
    rounds: int
    scaling: scaling.Shapes


FULL = Effort(
    passes=3,
    load_s=3.0,
    largest=MOST_TEXTS,
    line_s=5.0,
    repeated_s=21.0,
    counts=(1, 2, 4),
    rounds=200,
    scaling=scaling.Shapes(
        scaling.series_of(quick=False), scaling.SIZES, rounds=8, slice_ms=12.0, limit_s=35.0
    ),
)
QUICK = Effort(
    passes=1,
    load_s=1.0,
    largest=16,
    line_s=1.0,
    repeated_s=2.4,
    counts=(1, 2),
    rounds=20,
    scaling=scaling.Shapes(
        scaling.series_of(quick=True), scaling.SIZES[:1], rounds=1, slice_ms=5.0, limit_s=5.0
    ),
)
Say = Callable[[str], None]


@click.command()
@click.option("--quick", is_flag=True, help="A smoke run of under a minute; its figures are rough.")
@click.option(
    "--only",
    type=click.Choice(PARTS),
    multiple=True,
    help="Measure this part alone; may be given several times.",
)
@common_options
def main(quick: bool, only: tuple[str, ...], repository: Path, out: Path) -> None:
    """Measure where the time goes: stages, scaling, long texts, repeated texts, instances."""
    end_as_ctrl_c_does()
    os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here leaves the machine
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        results = measure(QUICK if quick else FULL, repository, only or PARTS)
    except (ServeFailed, LoadFailed, ValueError) as error:
        raise click.ClickException(str(error)) from error
    out.mkdir(parents=True, exist_ok=True)
    drawn = profile_plots.draw(results, out)
    (out / "profile.json").write_text(results.to_json(), encoding="utf-8")
    (out / "profile.md").write_text(profile_page.page(results, drawn), encoding="utf-8")
    click.echo(f"{results.seconds:.0f} s; {out / 'profile.md'}")


@dataclass
class _Loads:
    """What the server gave, before anything is timed in this process."""

    triton: str = ""
    seen: tuple[Seen, Seen] | None = None
    no_op: Seen | None = None
    overheads: tuple[Overhead, ...] = ()
    client: Latency | None = None
    line: Sequence[Line] = ()
    repeated: Repeated | None = None


def measure(effort: Effort, repository: Path, parts: Sequence[str]) -> ProfileResults:
    """All parts asked for, the server's first."""
    began = time.monotonic()

    def say(step: str) -> None:
        click.echo(f"[{time.monotonic() - began:4.0f} s] {step}", err=True)

    machine, others = describe(), Bystanders()
    others.look()
    loads = _Loads()
    if {"time", "line", "repeated"} & set(parts):
        with served(repository) as server:
            loads.triton = str(server.get("/v2")["version"])
            _loads(server, effort, parts, loads, say, others.look)
    if "time" in parts:
        say("time: an encoder that does nothing")
        _no_op(repository, effort, loads)
        others.look()
    several: list[Instances] = []
    if "instances" in parts:
        several = instances(
            repository,
            effort.counts,
            passes=effort.passes,
            seconds=effort.load_s,
            largest=effort.largest,
            line_s=1.5 * effort.line_s,
            say=say,
        )
        others.look()
    spent = None
    if "time" in parts:
        say("time: tokenizer and encoder in this process")
        spent = _inside(repository, effort, loads)
    grown = None
    if "scaling" in parts:
        grown = scaling.measure(repository, effort.scaling, say)
    others.look()
    return ProfileResults(
        machine=machine,
        quick=effort is QUICK,
        seconds=time.monotonic() - began,
        other_work=Sample.of(others.percent),
        triton=loads.triton,
        engine=str(choose("cpu")),
        time=spent,
        scaling=grown,
        line=list(loads.line),
        repeated=loads.repeated,
        instances=several,
    )


def _loads(
    server: Served,
    effort: Effort,
    parts: Sequence[str],
    loads: _Loads,
    say: Say,
    between: Callable[[], None],
) -> None:
    """All loads on the server as it is. Repeated texts come last: they fill its cache."""
    source = Texts(seed=31)
    passes, seconds = effort.passes, effort.load_s
    if "time" in parts:
        say("time: one text at a time")
        alone = see(
            server, source, "one new text at a time", clients=1, passes=passes, seconds=seconds
        )
        say(f"time: {LOADED_CLIENTS} clients")
        between()
        loaded = see(
            server,
            source,
            f"{LOADED_CLIENTS} clients, texts of 5-60 words",
            clients=LOADED_CLIENTS,
            passes=passes,
            seconds=seconds,
            mix=True,
        )
        loads.seen = alone, loaded
        say("time: new and cached texts, the client")
        half = seconds / 2
        loads.overheads = (
            overhead(server, source, "a new text", passes=passes, seconds=half),
            overhead(server, source, "a cached text", passes=passes, seconds=half, cached=True),
        )
        loads.client = through_client(server, source, seconds=half)
        between()
    if "line" in parts:
        say("line: short texts beside long ones")
        loads.line = head_of_line(server, source, largest=effort.largest, seconds=effort.line_s)
        between()
    if "repeated" in parts:
        say("repeated texts")
        loads.repeated = repeated_texts(server, seconds=effort.repeated_s)
        between()


def _no_op(repository: Path, effort: Effort, loads: _Loads) -> None:
    """The ensemble's own cost, with an encoder that answers ones."""
    passes, seconds = effort.passes, effort.load_s / 2
    with tempfile.TemporaryDirectory(prefix="arrowhead-profile-") as name:
        copy = with_no_op(repository, Path(name) / "repository")
        with served(copy) as server:
            source = Texts(seed=32)
            title = "no-op encoder, one new text at a time"
            loads.no_op = see(server, source, title, clients=1, passes=passes, seconds=seconds)
            no_op = overhead(
                server, source, "a new text, no-op encoder", passes=passes, seconds=seconds
            )
            loads.overheads = (*loads.overheads[:1], no_op, *loads.overheads[1:])


def _inside(repository: Path, effort: Effort, loads: _Loads) -> TimeResults | None:
    """The same work in this process, and what the server saw divided by it."""
    if loads.seen is None or loads.no_op is None or loads.client is None:
        return None
    inside = Inside(repository)
    alone, loaded = loads.seen
    short = inside.for_load(alone, mix=False, rounds=2 * effort.rounds)
    where = [
        take_apart(alone, short),
        take_apart(loaded, inside.for_load(loaded, mix=True, rounds=effort.rounds // 4)),
        take_apart(loads.no_op, short, no_op=True),
    ]
    return TimeResults(where, list(loads.overheads), loads.client)


if __name__ == "__main__":
    main()
