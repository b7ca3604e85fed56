# SPDX-License-Identifier: Apache-2.0
"""The page of `python -m perf.bulk`. Every number on it comes from the results."""

from __future__ import annotations

from typing import TYPE_CHECKING

from arrowhead_bulk.corpus import MOST_UNIT_ROWS
from perf.report import head, table

if TYPE_CHECKING:
    from perf.bulk import BulkResults
    from perf.stats import Sample

BILLION = 10**9
HOURS_S = 3600.0
VECTOR_BYTES = 384 * 4  # of MiniLM


def less_start(rows: int, whole_s: float, nothing_s: Sample) -> float | None:
    """Rows a second without what a job costs whatever its size; None if they cannot be told."""
    left_s = whole_s - nothing_s.median
    is_clear = left_s > max(3 * (nothing_s.high - nothing_s.low), 0.2 * nothing_s.median)
    return rows / left_s if is_clear else None


def page(results: BulkResults) -> str:
    """The page."""
    ours = results.rates["one process"]
    nothing = results.nothing_s["one process"]
    rate = less_start(results.rows, ours.whole_s.median, nothing) or ours.rows.median
    parts = [
        *head(
            results,
            "Bulk embedding",
            "Written by `python -m perf.bulk` (see the README beside this folder); overwritten by "
            f"each run. MiniLM, texts of {results.tokens_a_row:.0f} tokens on average, made of "
            "common words, from a Parquet file into Parquet files. sentence-transformers computes "
            "in float32 and batches of 32, as it does by itself, where nothing else is said; "
            "Arrowhead in what it chooses here.",
            facts=[("device", results.device)],
        ),
        "## Beside sentence-transformers",
        f"{results.rows:,} rows, {results.peer_rows:,} of them for sentence-transformers, in "
        "turns; medians (extremes). Ours are with opening and proving the model, theirs with a "
        "loaded one. *Whole* is from the command to its end, with Python's start and the "
        "publishing; of theirs the call alone.",
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
        "One job each on a cluster of this machine alone, begun with the job. On a CPU a worker "
        "computes with one thread, so more of them than cores only share these. Rows a second are "
        "with the cluster's start, and less what a job of eight rows takes; units are of "
        f"{results.unit_rows:,} rows. Memory is PSS, which counts shared pages in parts; one "
        f"process without Ray has {results.one_mb:,.0f} MB at most.",
        table(
            ["workers", "rows", "whole, s", "rows/s", "less the start", "MB a worker", "MB of all"],
            [
                (
                    str(one.workers),
                    f"{one.rows:,}",
                    f"{one.whole_s:.1f}",
                    f"{one.rows_s:,.0f}",
                    f"{rate_on_ray:,.0f}"
                    if (rate_on_ray := less_start(one.rows, one.whole_s, results.nothing_s["Ray"]))
                    else "-",
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
        f"Not measured, but worked out from {rate:,.0f} rows a second: those of one process above, "
        "less what a job costs whatever its size. It holds if a machine more does as much more, "
        "which Ray was not asked to prove here beyond the workers above.",
        table(
            ["", ""],
            [
                ("hours of one machine as this one", f"{BILLION / rate / HOURS_S:,.1f}"),
                ("machines as this one, for a day", f"{BILLION / rate / HOURS_S / 24:,.1f}"),
                *(
                    (f"output in {precision}, GB", f"{BILLION * size / 1e9:,.0f}")
                    for precision, size in results.bytes_a_row.items()
                ),
                (f"files, of {MOST_UNIT_ROWS:,} rows each", f"{BILLION / MOST_UNIT_ROWS:,.0f}"),
                (
                    "seconds until a dead worker's rows are done by another one",
                    f"{nothing.median + MOST_UNIT_ROWS / rate:,.0f}",
                ),
            ],
        ),
        "Assumed: texts as long as here, the same model, storage that takes "
        f"{rate * VECTOR_BYTES / 1e6:,.1f} MB of float32 a second from each machine, and "
        "machines that are not paid for while they wait.",
    ]
    return "\n\n".join(parts) + "\n"
