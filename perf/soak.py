# SPDX-License-Identifier: Apache-2.0
"""`python -m perf.soak`: the stack under mixed load for an hour. Does it leak, drift or fail?

1. The stack starts; every memory of texts is filled; what it can do at most is measured.
2. At rest: what is held while nobody asks.
3. The load, at about half of the most, with new versions and killed model processes meanwhile.
4. At rest again; then everything stops, and nothing may be left.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

import click
import uvloop

from deploy.stack import Stack, StackError, free_prefix
from perf import soak_page
from perf.common import common_options, end_as_ctrl_c_does
from perf.copies import with_twin
from perf.machine import describe
from perf.soak_load import TextPool
from perf.soak_results import UNSOUND, SoakResults
from perf.soak_run import QUICK, Effort, Lost, Soak
from perf.soak_watch import History


@click.command(epilog='Example: make soak ARGS="--minutes 20 --replicas 1"')
@click.option(
    "--minutes", type=click.FloatRange(min=1), default=60, show_default=True, help="Of load."
)
@click.option(
    "--replicas", type=click.IntRange(1, 9), default=3, show_default=True, help="Tritons."
)
@click.option("--gateways", type=click.IntRange(1, 9), default=2, show_default=True)
@click.option("--quick", is_flag=True, help="A smoke run of a minute; sees coarse leaks only.")
@common_options
def main(
    minutes: float, replicas: int, gateways: int, quick: bool, repository: Path, out: Path
) -> None:
    """Run the stack under mixed load, change its versions, kill processes, and look for leaks.

    Exits with 1 if something was lost, grows or is left behind. What could grow as well as not, in
    so short a time, is told as unclear: that is no fault, and no proof that there is none. Ctrl-C
    during the load ends it there, and the page tells of what was until then.
    """
    end_as_ctrl_c_does()
    os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here leaves the machine
    effort = QUICK if quick else Effort.of(minutes)
    try:
        results, history = soak(repository, effort, replicas=replicas, gateways=gateways)
    except (StackError, Lost, OSError) as error:
        raise click.ClickException(str(error)) from error
    out.mkdir(parents=True, exist_ok=True)
    drawn = soak_page.draw(results, history, out)
    (out / "soak.json").write_text(results.to_json(), encoding="utf-8")
    (out / "soak.md").write_text(soak_page.page(results, drawn), encoding="utf-8")
    for what, found in soak_page.conclusion(results):
        click.echo(f"{what}: {found}")
    click.echo(f"{results.seconds:.0f} s; {out / 'soak.md'}")
    if results.outcome == UNSOUND:
        sys.exit(1)


def soak(
    repository: Path, effort: Effort, *, replicas: int, gateways: int
) -> tuple[SoakResults, History]:
    """The whole soak.

    Raises:
        StackError: the stack did not come up, or did not stop.
        Lost: something was lost before the load began.
    """
    began, machine = time.monotonic(), describe()
    with tempfile.TemporaryDirectory(prefix="arrowhead-soak-") as folder:
        models = Path(folder) / "model_repository"
        versions = with_twin(repository, models)
        _say("vectors that are known to be right")
        known = TextPool(models, versions[0])
        stack = Stack(
            models, replicas=replicas, gateways=gateways, prefix=free_prefix(), on_ready=_say
        )
        with stack:
            run = Soak(stack, models, versions, known, effort)
            uvloop.run(run.run())
        left = run.left_behind()
    results = run.results(machine, effort is QUICK, time.monotonic() - began, left)
    return results, run.history


def _say(step: str) -> None:
    click.echo(step, err=True)


if __name__ == "__main__":
    main()
