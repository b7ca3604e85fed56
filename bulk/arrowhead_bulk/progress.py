# SPDX-License-Identifier: Apache-2.0
"""What a job has done so far, on a bar while it runs, and in words and JSON when it is over."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from tqdm import tqdm

from arrowhead_bulk.job import Job, Total
from arrowhead_bulk.parts import Done


class Progress:
    """The bar, and the count of it all; a context manager.

    Args:
        rows, units: of the whole corpus.
        shown: whether there is a bar; None shows it on a terminal.

    Attributes:
        total: what came of the units that are done.
    """

    def __init__(self, rows: int, units: int, shown: bool | None = None) -> None:
        self.total = Total()
        self._units = units
        self._rows, self._tokens = 0, 0
        self._began = time.monotonic()
        self._ended: float | None = None
        self._bar = tqdm(
            total=rows,
            desc="embed",
            unit="row",
            unit_scale=True,
            disable=None if shown is None else not shown,
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._ended = time.monotonic()
        self._bar.close()

    @property
    def seconds(self) -> float:
        """Since it began; of the whole once it is over."""
        return (self._ended or time.monotonic()) - self._began

    def rows(self, rows: int, tokens: int) -> None:
        """So many rows of a unit that is under way are done."""
        self._rows += rows
        self._tokens += tokens
        self._show(rows)

    def done(self, done: Done) -> None:
        """A unit is done; its rows may have been told before."""
        self.total.add(done)
        if done.was_there:
            # Another run's work: it counts as done, and not as done so quickly.
            if not self._bar.disable:
                self._bar.initial += done.seen
            self._show(done.seen)
            return
        # What was not told; or was told twice, of a unit that somebody died over.
        if self.total.own_rows > self._rows or self.total.units == self._units:
            self.rows(self.total.own_rows - self._rows, self.total.own_tokens - self._tokens)

    def _show(self, rows: int) -> None:
        told = {"tokens/s": f"{self._tokens / max(self.seconds, 1e-3):,.0f}"}
        if self.total.bad:
            told["bad"] = f"{self.total.bad.total():,}"
        self._bar.set_postfix(told, refresh=False)
        self._bar.update(rows)


def report(job: Job, total: Total, seconds: float, workers: Mapping[str, Any]) -> dict[str, Any]:
    """What there is to tell of a job, JSON-ready.

    Args:
        job: which is done.
        total: what came of it.
        seconds: how long this run took.
        workers: who did it.
    """
    task = job.task
    return {
        "out": task.out,
        "rows": total.rows,
        "bad": dict(sorted(total.bad.items())),
        "blank_lines": total.blank,
        "tokens": total.tokens,
        "truncated": total.truncated,
        "parts": total.units,
        "parts_of_before": total.found,
        "seconds": round(seconds, 3),
        "rows_per_s": round(total.own_rows / max(seconds, 1e-9), 1),
        "tokens_per_s": round(total.own_tokens / max(seconds, 1e-9), 1),
        "workers": dict(workers),
        "model": task.info.name,
        "version": task.info.version,
        "fingerprint": task.info.fingerprint,
        "precision": task.kind,
        "files": len(task.corpus.files),
    }


def in_words(told: Mapping[str, Any]) -> str:
    """A report for people."""
    lines = [
        f"{told['rows']:,} vectors in {told['out']}, {told['parts']:,} files of model "
        f"{told['model']} version {told['version']}",
        f"{told['tokens']:,} tokens; {told['truncated']:,} texts were cut",
    ]
    if told["parts_of_before"] < told["parts"]:
        lines.append(
            f"{told['seconds']:,.1f} s: {told['rows_per_s']:,.0f} rows/s, "
            f"{told['tokens_per_s']:,.0f} tokens/s"
        )
    if told["parts_of_before"]:
        lines.append(f"{told['parts_of_before']:,} files were there already")
    if told["bad"]:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in told["bad"].items())
        lines.append(
            f"{sum(told['bad'].values()):,} rows have no vector ({reasons}): "
            f"see {told['out']}/_bad/"
        )
    return "\n".join(lines)
