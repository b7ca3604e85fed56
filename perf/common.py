# SPDX-License-Identifier: Apache-2.0
"""What the commands of perf/ share: their options, what every run knows, how a run ends."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import click

from perf.machine import ROOT, Machine
from perf.stats import Sample

OUT = Path(__file__).parent / "results"
MOST_OTHER_WORK = 15.0  # percent of all cores; an idle server's own probes take 1 or 2

F = TypeVar("F", bound=Callable[..., Any])

sts_option = click.option(
    "--sts",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="CSV of sentence1,sentence2,score, for the semantic accuracy.",
)


def common_options(command: F) -> F:
    """Decorates with `--repository` and `--out`."""
    out = click.option(
        "--out",
        type=click.Path(file_okay=False, path_type=Path),
        default=OUT,
        show_default="perf/results",
        help="Where to write.",
    )
    repository = click.option(
        "--repository",
        type=click.Path(exists=True, file_okay=False, path_type=Path),
        default=ROOT / "model_repository",
        show_default="model_repository",
        help="The model repository to serve.",
    )
    return repository(out(command))


def end_as_ctrl_c_does() -> None:
    """Has SIGTERM raise, so that what was started is stopped."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


@dataclass(frozen=True)
class Run:
    """What every run knows of itself.

    Attributes:
        quick: whether it was a smoke run, whose figures mean little.
        seconds: how long it took.
        other_work: percent of the cores that others used, looked at between measurements.
    """

    machine: Machine
    quick: bool
    seconds: float
    other_work: Sample

    @property
    def is_disturbed(self) -> bool:
        """Whether others worked on the machine so much that the figures are not the server's."""
        return self.other_work.high > MOST_OTHER_WORK

    def to_json(self) -> str:
        """Everything, medians unrounded."""
        return json.dumps(asdict(self), indent=2) + "\n"


def last_line(text: str) -> str:
    """The last line that says anything."""
    return (text.strip().splitlines() or [""])[-1].strip()
