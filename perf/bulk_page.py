# SPDX-License-Identifier: Apache-2.0
"""The page of `python -m perf.bulk`. Every number on it comes from the results."""

from __future__ import annotations

from typing import TYPE_CHECKING

from arrowhead_bulk.corpus import MOST_UNIT_ROWS
from perf.report import head, table

if TYPE_CHECKING:
    from perf.bulk import BulkResults

BILLION = 10**9
HOURS_S = 3600.0


def page(results: BulkResults) -> str:
    """The page."""
    ours = results.rates["one process"]
    parts = [
        *head(
            results,
            "Bulk embedding",
            "Written by `python -m perf.bulk` (see the README beside this folder); overwritten by "
            f"each run. MiniLM, texts of {results.tokens_a_row:.0f} tokens on average, made of "
            "common words, from a Parquet file into Parquet files. sentence-transformers computes "
            "in float32, as it does by itself; Arrowhead in what it chooses here.",
        ),
        "## Beside sentence-transformers",
        f"{results.rows:,} rows, in turns; medians (extremes). *Whole* is from the command to its "
        "end, with the start of Python, the model's proof and the publishing; of "
        "sentence-transformers it begins with a loaded model.",
        table(
            ["", "rows/s", "tokens/s", "whole, s", "ratio to ours"],
            [
                (
                    f"`arrowhead bulk embed`, {way}" if way == "one process" else f"`{way}`",
                    rate.rows.show(0),
                    rate.tokens.show(0),
                    rate.whole_s.show(1),
                    f"{rate.rows.median / ours.rows.median:.2f}",
                )
                for way, rate in results.rates.items()
            ],
        ),
        "## On Ray",
        "One job each on a cluster of this machine alone. A worker computes with one thread, so "
        "more of them than cores only share these. Rows a second are with the cluster's start, "
        "units are of 256 rows; PSS counts shared pages in parts.",
        table(
            ["workers", "rows/s", "whole, s", "a worker, MB (PSS)", "all of Ray, MB (PSS)"],
            [
                (
                    str(one.workers),
                    f"{one.rows_s:,.0f}",
                    f"{one.whole_s:.1f}",
                    f"{one.worker_mb:,.0f}",
                    f"{one.all_mb:,.0f}",
                )
                for one in results.on_ray
            ],
        ),
        "A job of eight rows, from the command to its end: "
        + ", ".join(f"{way} {sample.show(1)} s" for way, sample in results.nothing_s.items())
        + ". That is what a job costs whatever its size.",
        "## A billion rows",
        "Not measured: what the figures above say if a machine more does as much more, which Ray "
        "has not been asked to prove here beyond the workers above.",
        table(
            ["", ""],
            [
                (
                    "hours of one machine as this one",
                    f"{BILLION / ours.rows.median / HOURS_S:,.0f}",
                ),
                (
                    "machines as this one, for a day",
                    f"{BILLION / ours.rows.median / HOURS_S / 24:,.1f}",
                ),
                *(
                    (f"output in {precision}, GB", f"{BILLION * size / 1e9:,.0f}")
                    for precision, size in results.bytes_a_row.items()
                ),
                (f"files, of {MOST_UNIT_ROWS:,} rows each", f"{BILLION / MOST_UNIT_ROWS:,.0f}"),
                (
                    "seconds of one machine that a lost file costs",
                    f"{MOST_UNIT_ROWS / ours.rows.median:,.0f}",
                ),
            ],
        ),
        "Assumed: texts as long as here, the same model, storage that gives and takes "
        f"{ours.rows.median * max(results.bytes_a_row.values()) / 1e6:,.1f} MB a second for each "
        "machine, and machines that are not paid for while they wait. A GPU was not measured.",
    ]
    return "\n\n".join(parts) + "\n"
