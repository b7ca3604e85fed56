# SPDX-License-Identifier: Apache-2.0
"""`perf.sizing` as a Markdown page, a picture, and the tables of docs/sizing.md."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from perf.plots import BLUE, ORANGE, figure_of
from perf.report import picture, table
from perf.sizing_events import POLL_S, ROOM, THRESHOLD
from perf.sizing_results import Needed, Point, SizingResults

_LOAD_PLOT = "sizing_latency.png"
_COLOURS = ("#999999", ORANGE, BLUE, "#009e73")
_TICKS = (5, 10, 20, 50, 100, 200)
_DAYS = (1e5, 1e6, 1e7, 1e8, 1e9)  # texts a day
_PEAK = 3.0  # the busiest minute over the day's mean


def page(results: SizingResults, plots: Collection[str]) -> str:
    """The whole page, with those of the plots that were drawn."""
    parts = [
        *_head(results),
        *_server(results),
        *_curves(results),
        *picture(plots, _LOAD_PLOT, "Latency over load, by replicas"),
        *_rules(results),
        *_needed(results),
        *_capacities(results),
        *_disturbed(results),
        *_steps(results),
        *_spares(results),
        *_cached(results),
        *_memory(results),
        *_wires(results),
    ]
    return "\n\n".join(parts) + "\n"


def summary(results: SizingResults) -> str:
    """What stands in docs/sizing.md."""
    worst = max(check.tail for check in results.checks)
    return "\n\n".join(
        [
            f"A replica is one `arrowhead serve` with {results.cores} cores of {results.cpu}, "
            f"MiniLM in {results.service.dtype}, measured {results.date[:10]}. The simulated "
            f"server is up to {results.margin:.2f} times as fast as the measured one; replicas "
            f"are counted with one that is so much slower. p99 was measured up to {worst:.2f} "
            f"times as high as simulated: where a p99 is wanted, the slower one's counts as "
            f"{results.tail:.2f} times as high, which makes up for that.",
            "**Texts a day to replicas**, texts of 5-60 words that no memory knows, the busiest "
            f"minute at {_PEAK:g} times the day's mean, each replica at most "
            f"{results.planned:.0%} busy in it, one to spare:",
            _days(results),
            "**Requests a second, and the latency wanted, to replicas** (none to spare):",
            _needed_table(results.needed),
            "**What a replica computes, and what it costs**:",
            _capacity_table(results),
            "**What a replica needs**:",
            *_memory(results)[1:],
            "**What goes over the network**:",
            *_wires(results)[1:],
        ]
    )


def draw(results: SizingResults, folder: Path) -> list[str]:
    """Draws latency over load; returns the file's name."""
    with figure_of(folder / _LOAD_PLOT, size=(11, 4.5), columns=2) as (_, (middle, tail)):
        for count, colour in zip(_counts(results.curves), _COLOURS, strict=False):
            some = [point for point in results.curves if point.replicas == count]
            busy = [100 * point.busy for point in some]
            label = f"{count} replica{'s' * (count > 1)}"
            middle.plot(busy, [point.p50_ms for point in some], "-o", color=colour, label=label)
            tail.plot(busy, [point.p99_ms for point in some], "-o", color=colour, label=label)
        for axes, what in ((middle, "p50, ms"), (tail, "p99, ms")):
            axes.set_xlabel("load, % of what all replicas compute at most")
            axes.set_ylabel(f"{what} (log scale)")
            axes.set_yscale("log")
            axes.set_yticks(_TICKS, [f"{tick}" for tick in _TICKS])
            axes.minorticks_off()
            axes.set_ylim(5, 300)
        tail.legend()
    return [_LOAD_PLOT]


def _counts(points: Sequence[Point]) -> list[int]:
    return sorted({point.replicas for point in points})


def _targets(needed: Sequence[Needed]) -> list[float]:
    return sorted({one.target_ms for one in needed})


def _head(results: SizingResults) -> list[str]:
    parts = [
        "# How many servers",
        "Written by `python -m perf.sizing` (see the README beside this folder); overwritten by "
        "each run. **Simulated**, but for one server's figures, which `perf.profile` measured: "
        f"{results.cpu}, {results.cores} cores, {results.service.dtype}, Arrowhead "
        f"{results.revision}, {results.date}. A request is one text that no memory knows, of 5-60 "
        "words where nothing else is said. Callers, network and gateways are elsewhere and take "
        "nothing. Two balancers, which know of their own requests only, give each to the replica "
        "that has the fewest of theirs.",
    ]
    if results.quick:
        parts.append("**A smoke run (`--quick`): too short for its figures to mean much.**")
    return parts


def _server(results: SizingResults) -> list[str]:
    one = results.service
    rows = [
        (
            check.load.title,
            f"`{check.load.source}`",
            *(
                f"{measured.show(digits)} / {simulated:,.{digits}f} "
                f"({simulated / measured.median - 1:+.0%})"
                for measured, simulated, digits in (
                    (check.load.p50_ms, check.p50_ms, 1),
                    (check.load.p99_ms, check.p99_ms, 1),
                    (check.load.requests_s, check.requests_s, 0),
                )
            ),
        )
        for check in results.checks
    ]
    return [
        "## One server, measured and simulated",
        f"A step holds the server for {one.step_ms:.2f} ms, {one.text_ms:.2f} ms a text and "
        f"{one.token_ms:.4f} ms a token; a caller waits {one.way_ms:.2f} ms beside that. Steps of "
        f"the same size differ: of one text by a factor of exp({one.spread:.2f} z), of n texts by "
        f"a square root of n less. The line is off the engine's own figures by {one.off:.0%} "
        "(median). Measured / simulated, closed loops that none of this was taken from:",
        table(["load", "figures", "p50, ms", "p99, ms", "req/s"], rows),
        f"At worst the simulated server is {results.margin:.2f} times as fast as the measured one "
        "(p50 or rate). Replicas are counted with a server that is so much slower; all else is "
        "relative to load, and not.",
    ]


def _curves(results: SizingResults) -> list[str]:
    rows = [
        (
            f"{point.replicas}",
            f"{point.busy:.0%}",
            f"{point.p50_ms:.1f}",
            f"{point.p99_ms:.1f}",
            f"{point.p999_ms:.1f}",
        )
        for point in results.curves
    ]
    return [
        "## Latency over load",
        "Arrivals that know nothing of each other (Poisson). A larger fleet stands more load at "
        "the same latency: what comes at one moment spreads over more replicas.",
        table(["replicas", "load", "p50, ms", "p99, ms", "p99.9, ms"], rows),
    ]


def _rules(results: SizingResults) -> list[str]:
    rows = [
        (
            point.rule,
            point.arrivals,
            f"{point.p50_ms:.1f}",
            f"{point.p99_ms:.1f}",
            f"{point.p999_ms:.1f}",
        )
        for point in results.rules
    ]
    count, busy = results.rules[0].replicas, results.rules[0].busy
    return [
        "## How requests are spread",
        f"{count} replicas at {busy:.0%}. *bursty*: a fifth of the time at twice the rate, "
        "half a second at a time. `least requests` is HAProxy's leastconn, which the stack has.",
        table(["rule", "arrivals", "p50, ms", "p99, ms", "p99.9, ms"], rows),
    ]


def _told(needed: Needed) -> str:
    return f"{needed.replicas} ({needed.busy:.0%} busy)" if needed.replicas else "not to be had"


def _needed_table(needed: Sequence[Needed]) -> str:
    targets = _targets(needed)
    rates = sorted({one.requests_s for one in needed})
    found = {(one.requests_s, one.target_ms): one for one in needed}
    return table(
        ["req/s", *(f"p99 within {target:g} ms" for target in targets)],
        [
            (
                f"{rate:,.0f}",
                *(_told(found[rate, target]) for target in targets),
            )
            for rate in rates
        ],
    )


def _needed(results: SizingResults) -> list[str]:
    return [
        "## Replicas for a rate",
        "The fewest that are at most 90 % busy and whose p99 is within the target, with servers "
        f"{results.margin:.2f} times as slow as simulated, and a p99 {results.tail:.2f} times as "
        "high as theirs: as high as any that was measured. Add one for the one that is away.",
        _needed_table(results.needed),
    ]


def _capacity_table(results: SizingResults) -> str:
    return table(
        ["computes in", "tokens a text", "texts/s at most", "vCPU-hours a million texts"],
        [
            (one.dtype, f"{one.tokens:g}", f"{one.texts_s:,.0f}", f"{one.vcpu_hours:.2f}")
            for one in results.capacities
        ],
    )


def _capacities(results: SizingResults) -> list[str]:
    return [
        "## What a replica computes, and what it costs",
        f"Full steps, and hours at {results.planned:.0%} of that.",
        _capacity_table(results),
    ]


def _days(results: SizingResults) -> str:
    rows = []
    capacities = {(one.dtype, one.tokens): one.texts_s for one in results.capacities}
    mixed = sorted({tokens for _, tokens in capacities})[1]
    dtypes = list(dict.fromkeys(one.dtype for one in results.capacities))
    for day in _DAYS:
        peak = day / 86_400 * _PEAK
        counts = []
        for dtype in dtypes:
            rate = capacities[dtype, mixed] / results.margin * results.planned
            counts.append(f"{-(-peak // rate) + 1:,.0f}")
        rows.append((f"{day:,.0f}", f"{peak:,.0f}", *counts))
    return table(["texts a day", "req/s at the peak", *(f"replicas, {d}" for d in dtypes)], rows)


def _disturbed(results: SizingResults) -> list[str]:
    rows = [
        (
            one.what,
            f"{one.replicas}",
            f"{one.busy:.0%}",
            f"{one.quiet_p99_ms:.0f}",
            f"{one.p99_ms:.0f}",
            f"{one.p999_ms:.0f}",
            f"{one.most_ms:.0f}",
        )
        for one in results.disturbed
    ]
    return [
        "## When something happens",
        "*a replica dies*: one every 20 s, back after 2 s; what it held is asked of another. "
        "*rolling update*: each in turn gets nothing new for 20 s, and there is none in its "
        "place (maxSurge 0, as with GPUs). No request is lost in either; what a loss costs is "
        "latency, and without room for one replica less it costs seconds.",
        table(
            ["what", "replicas", "load", "p99 without, ms", "p99, ms", "p99.9, ms", "longest, ms"],
            rows,
        ),
    ]


def _seconds(value: float | None) -> str:
    return "never" if value is None else f"{value:.0f}"


def _steps(results: SizingResults) -> list[str]:
    rows = [
        (
            f"{one.times:g}",
            f"{one.start_s:g}",
            _seconds(one.first_s),
            _seconds(one.enough_s),
            _seconds(one.quiet_s),
            f"{one.refused:.1%}",
            f"{one.p99_ms:,.0f}",
            f"{one.replicas}",
        )
        for one in results.steps
    ]
    return [
        "## When the load grows at once",
        "Three replicas at 60 %, then so many times that; at most 12. The autoscaler looks every "
        f"{POLL_S:g} s at the mean of a minute of requests under way, and wants {THRESHOLD:g} a "
        f"replica (deploy/kubernetes). HAProxy refuses (429) what is beyond {ROOM} under way. "
        "Seconds from the step:",
        table(
            [
                "times the load",
                "a start takes, s",
                "one more after, s",
                "enough after, s",
                "p99 within 250 ms after, s",
                "refused",
                "p99 of the first minute, ms",
                "replicas at the end",
            ],
            rows,
        ),
        "An autoscaler follows the day; it does not catch a step. Room for a step must be there "
        "before it.",
    ]


def _spares(results: SizingResults) -> list[str]:
    rows = [
        (
            f"{one.needed} + {one.spare}",
            f"{one.away:.2%}",
            f"{one.short_s:,.1f}" if one.short_s < 100 else f"{one.short_s:,.0f}",
        )
        for one in results.spares
    ]
    return [
        "## One to spare",
        "Seconds in a month with fewer replicas than the load takes, if each is away for a share "
        "of the time by itself (binomial). What takes several at once (a zone, a bad model, a "
        "bad configuration) is not in it.",
        table(["replicas: needed + to spare", "each away", "s a month"], rows),
    ]


def _cached(results: SizingResults) -> list[str]:
    rows = [
        (
            f"{one.different:,}",
            f"{one.count}",
            f"{one.entries:,}",
            f"{one.early:.0%}",
            f"{one.late:.0%}",
        )
        for one in results.cached
    ]
    return [
        "## Texts that come again",
        "Texts by Zipf's law (exponent 1), spread without regard to the text: the share that "
        "memories answer, of the first tenth of the requests (cold) and of the second half. "
        "Several memories each see a part of the requests and come to hold the same: more of them "
        "answer no more, and are cold for longer.",
        table(["different texts", "memories", "texts in each", "cold", "later"], rows),
    ]


def _memory(results: SizingResults) -> list[str]:
    rows = [
        (
            one.model,
            f"{one.million_weights:.0f}",
            f"{one.replica_mb:,.0f}",
            "" if one.another_process_mb is None else f"{one.another_process_mb:.0f}",
            "measured" if one.is_measured else "worked out: MiniLM's, and 2 bytes a weight",
        )
        for one in results.memory
    ]
    return [
        "## Memory",
        "PSS of all processes of a replica after load, with a full response cache, native "
        "engine, float16 weights.",
        table(["model", "million weights", "MB", "another process of the encoder, MB", ""], rows),
    ]


def _wires(results: SizingResults) -> list[str]:
    rows = [
        (
            one.road,
            f"{one.sent:,.0f}",
            f"{one.answered:,.0f}",
            f"{(one.sent + one.answered) * 8e3 / 1e6:.1f}",
        )
        for one in results.wires
    ]
    return [
        "## Network",
        "A text of 5-60 words and its vector of 384 floats, bodies only.",
        table(["way", "sent, bytes", "answered, bytes", "Mbit/s at 1,000 texts/s"], rows),
    ]
