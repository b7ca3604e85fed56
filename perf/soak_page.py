# SPDX-License-Identifier: Apache-2.0
"""A soak as a Markdown page and two pictures. Every number comes from the results."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from perf.plots import BLUE, ORANGE
from perf.report import head, picture, table
from perf.soak_results import MOST_DRIFT, UNCLEAR, Life, SoakResults, Trend
from perf.soak_watch import History, lives

_MEMORY, _LATENCY = "soak_memory.png", "soak_latency.png"
_BINS = 60
_MINUTE_S = 60.0
_LIKE = ("/embed", "/v1/embeddings, list", "gRPC", "HTTP to Triton", "gRPC, long text", "refused")
_COLOURS = (BLUE, ORANGE, "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999999", "#000000")


def page(results: SoakResults, plots: Collection[str]) -> str:
    """The whole page, with those of the plots that were drawn."""
    parts = [
        *_head(results),
        *_verdict(results),
        *_memory(results),
        *picture(plots, _MEMORY, "Memory of each process over time, with what was done"),
        *_held(results),
        *_latency(results),
        *picture(plots, _LATENCY, "Latency over time, with what was done"),
        *_requests(results),
        *_events(results),
    ]
    return "\n\n".join(parts) + "\n"


def draw(results: SoakResults, history: History, folder: Path) -> list[str]:
    """Draws memory and latency over time; returns the files' names."""
    if not history.moments:
        return []
    _draw_memory(results, history, folder / _MEMORY)
    _draw_latency(results, history, folder / _LATENCY)
    return [_MEMORY, _LATENCY]


def conclusion(results: SoakResults) -> list[tuple[str, str]]:
    """What was looked for, and what was found, a line each."""
    by_verdict: dict[str, list[str]] = {}
    judged = [(one.verdict, one.of) for one in results.trends]
    judged += [(one.verdict, one.of) for one in results.rest]
    for verdict, of in judged:
        by_verdict.setdefault(verdict, []).append(str(of))
    slower = [drift.kind for drift in results.drifts if drift.verdict != "steady"]
    lines = [
        ("altogether", results.outcome.strip("*")),
        ("requests", f"{results.asked:,}"),
        ("vectors compared with the right ones", f"{results.vectors:,}"),
        ("wrong vectors", f"{len(results.wrong):,}"),
        ("failed requests", f"{results.failed:,}"),
        *((verdict.strip("*"), _listed(names)) for verdict, names in sorted(by_verdict.items())),
        (
            f"p50 more than {MOST_DRIFT:g} times that of the first third",
            _listed(slower) if slower else "none",
        ),
        ("left behind after the stop", _listed(results.left) if results.left else "nothing"),
    ]
    return [*lines, ("ended early", results.lost)] if results.lost else lines


def _listed(names: list[str]) -> str:
    most = 4
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def _head(results: SoakResults) -> list[str]:
    return head(
        results,
        "Soak: the stack under mixed load",
        "Written by `python -m perf.soak` (see the README beside this folder); overwritten by each "
        "run. The stack of `make stack` answers callers of all kinds, good and bad ones, at about "
        "half of what it can do at most, while versions of the model change and processes of it "
        "are killed. Every vector is compared with the engine's own. **Callers and servers share "
        "the cores.**",
        facts=[
            ("the stack", f"{results.replicas} Tritons, {results.gateways} gateways, HAProxy"),
            ("load", f"{results.load_s / _MINUTE_S:.1f} minutes"),
            (
                "requests a second",
                f"{results.asked / results.load_s:.0f}; at most it did {results.peak:.0f}",
            ),
        ],
        between="looks, during the load",
    )


def _verdict(results: SoakResults) -> list[str]:
    parts = [
        "## Verdict",
        table(["looked for", "found"], conclusion(results)).replace("---:", "---"),
    ]
    if results.outcome == UNCLEAR:
        parts.append(
            "What is unclear is neither sound nor a leak: its interval reaches beyond the bound, "
            "or it was watched for too short a time."
        )
    if results.lost:
        parts.insert(1, f"**It ended early: {results.lost}**")
    return parts


def _memory(results: SoakResults) -> list[str]:
    memory = [one for one in results.trends if one.of.quantity.unit == "MB"]
    return [
        "## Memory",
        "Private memory (anonymous pages: heap and stacks) of one process, and what all have "
        "together, in MB of 10^6 bytes. The slope is Theil and Sen's, over pairs of samples of the "
        "same process once it is warm, with the 95 % interval of a bootstrap in blocks. Memories "
        "of texts are full before the load begins. *bytes a request*: the growth of all such "
        "processes, spread over all requests, and the upper end of its interval: a leak of more "
        "would have been seen.",
        table(
            ["of", "processes", "lives", "first", "last", "slope, MB/hour", "bytes a request",
             "bound", ""],
            [
                (
                    _role(one),
                    str(one.processes),
                    str(one.lives),
                    f"{one.first:.1f}",
                    f"{one.last:.1f}",
                    one.slope.show() if one.slope else "",
                    _bytes(results, one),
                    f"{one.of.quantity.bound:g}",
                    one.verdict,
                )
                for one in memory
            ],
        ),
    ]  # fmt: skip


def _role(found: Trend) -> str:
    return found.of.role if found.of.role != "all" else f"all: {found.of.quantity.title}"


def _bytes(results: SoakResults, found: Trend) -> str:
    spread = results.bytes_a_request(found)
    return f"{spread[0]:+,.0f}, below {spread[1]:+,.0f}" if spread else ""


def _held(results: SoakResults) -> list[str]:
    others = [one for one in results.trends if one.of.quantity.unit != "MB"]
    return [
        "## Handles, threads, shared memory",
        "Under load, as above; then what all processes of a kind hold together while nobody asks, "
        "before the load and after it (the least of several looks).",
        table(
            ["of", "first", "last", "slope, an hour", "bound", ""],
            [
                (
                    str(one.of),
                    f"{one.first:.1f}",
                    f"{one.last:.1f}",
                    one.slope.show() if one.slope else "",
                    f"{one.of.quantity.bound:g}",
                    one.verdict,
                )
                for one in others
            ],
        ),
        table(
            ["at rest", "before", "after", "may be more by", ""],
            [
                (
                    str(one.of),
                    f"{one.before:g}",
                    f"{one.after:g}",
                    f"{one.allowed:g}",
                    one.verdict,
                )
                for one in results.rest
            ],
        ),
    ]


def _latency(results: SoakResults) -> list[str]:
    return [
        "## Latency",
        "In ms, from the moment when a request was due, in the first and the last third of the "
        "load. Refused ones are the bad requests.",
        table(
            ["kind", "answered", "p50 first", "p50 last", "ratio", "p99 first", "p99 last", ""],
            [
                (
                    one.kind,
                    f"{one.answered:,}",
                    f"{one.first_p50_ms:.1f}",
                    f"{one.last_p50_ms:.1f}",
                    f"{one.ratio:.2f}",
                    f"{one.first_p99_ms:.0f}",
                    f"{one.last_p99_ms:.0f}",
                    one.verdict,
                )
                for one in results.drifts
            ],
        ),
    ]


def _requests(results: SoakResults) -> list[str]:
    rows = [(kind, f"{count:,}", "answered, right") for kind, count in results.answered.items()]
    rows += [(kind, f"{count:,}", "refused, as wanted") for kind, count in results.refused.items()]
    rows += [("callers who hung up", f"{results.hung_up:,}", "")]
    rows += [(one.kind, f"{one.count:,}", f"**failed**: {one.how}") for one in results.failures]
    parts = ["## Requests", table(["kind", "requests", ""], sorted(rows))]
    if results.skipped_s:
        parts.append(
            f"For {results.skipped_s:.0f} s the machine was behind; what was due then was left out."
        )
    return parts


def _events(results: SoakResults) -> list[str]:
    return [
        "## What was done to it",
        table(
            ["what", "minute", "over after, s"],
            [
                (
                    one.what,
                    f"{one.at_s / _MINUTE_S:.1f}",
                    "never" if one.took_s is None else f"{one.took_s:.1f}",
                )
                for one in results.events
            ],
        ),
    ]


def _draw_memory(results: SoakResults, history: History, file: Path) -> None:
    roles = [one.of.role for one in results.trends if one.of.quantity.field == "private_mb"]
    figure = Figure(figsize=(11, 7), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    for role, colour in zip(roles, _COLOURS, strict=False):
        for number, life in enumerate(lives(history.moments, role, "private_mb")):
            label = role if number == 0 else None
            above.plot(life.at_s / _MINUTE_S, life.values, color=colour, label=label, lw=1)
    above.set_ylabel("private memory of each process, MB")
    above.set_yscale("log")
    minutes = np.array([moment.at_s for moment in history.moments]) / _MINUTE_S
    below.plot(minutes, [moment.pss_mb for moment in history.moments], color="#000000", lw=1)
    below.set_ylabel("all processes (PSS), MB")
    below.set_xlabel("minutes of load")
    _finish(figure, (above, below), history, file)


def _draw_latency(results: SoakResults, history: History, file: Path) -> None:
    figure = Figure(figsize=(11, 7), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    kinds = [kind for kind in _LIKE if kind in history.latencies]
    for kind, colour in zip(kinds, _COLOURS, strict=False):
        minutes, p50, p99 = _binned(history.latencies[kind])
        above.plot(minutes, p50, color=colour, label=f"{kind}, p50", lw=1.2)
        above.plot(minutes, p99, color=colour, ls=":", lw=1)
    above.set_ylabel("ms (log scale); dotted: p99")
    above.set_yscale("log")
    minutes = np.array([moment.at_s for moment in history.moments[1:]]) / _MINUTE_S
    below.plot(minutes, [one.other_work for one in history.moments[1:]], color="#999999", lw=1)
    below.set_ylabel("others' work, % of the cores")
    below.set_xlabel("minutes of load")
    _finish(figure, (above, below), history, file)


def _binned(life: Life) -> tuple[Any, Any, Any]:
    """Middles of intervals in minutes, and p50 and p99 of each that has enough requests."""
    edges = np.linspace(0, life.at_s.max() + 1e-6, _BINS + 1)
    place = np.digitize(life.at_s, edges) - 1
    some = [(edges[n : n + 2].mean(), life.values[place == n]) for n in range(_BINS)]
    told = [(at_s, values) for at_s, values in some if len(values) >= 5]
    if not told:
        return [], [], []
    at_s, p50, p99 = zip(
        *((at, np.median(values), np.percentile(values, 99)) for at, values in told), strict=True
    )
    return np.array(at_s) / _MINUTE_S, p50, p99


def _finish(figure: Any, every: tuple[Any, Any], history: History, file: Path) -> None:
    for axes in every:
        for event in history.events:
            colour, style = (ORANGE, "--") if event.kind == "kill" else ("#009e73", ":")
            axes.axvline(event.at_s / _MINUTE_S, color=colour, ls=style, lw=0.8)
        axes.grid(visible=True, alpha=0.3)
    every[0].legend(loc="upper right", fontsize=8, ncols=2)
    every[0].set_title("dotted lines: a version goes live; dashed: a model's process is killed")
    figure.savefig(file, dpi=90)
