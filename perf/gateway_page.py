# SPDX-License-Identifier: Apache-2.0
"""A run of `perf.gateway` as a Markdown page and a picture. Every number comes from the results."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from perf.gateway_results import CALLERS, TARGET_MS, TOKENS, GatewayResults, Loaded
from perf.plots import BLUE, ORANGE, figure_of
from perf.profile_server import DIFFERENT, EXPONENT
from perf.report import head, picture, table

_PLOT = "gateway.png"
_STYLES = {
    "grpc": ("#999999", "-o"),
    "stub": ("#999999", "--s"),
    "naive": (ORANGE, "-o"),
    "tei": (BLUE, "-o"),
    "openai": (BLUE, "--s"),
}


def page(results: GatewayResults, plots: Collection[str]) -> str:
    """The whole page, with the plot if it was drawn."""
    parts = [
        *_head(results),
        *_loads(results),
        *picture(plots, _PLOT, "Latency and rate of new texts by way and callers"),
        *_known(results),
        *_batches(results),
        *_same(results),
        *_again(results),
        *_outsets(results),
    ]
    return "\n\n".join(parts) + "\n"


def draw(results: GatewayResults, folder: Path) -> list[str]:
    """Draws new texts by way and callers; returns the file's name."""
    with figure_of(folder / _PLOT, size=(11, 4.5), columns=2) as (_, (latency, rate)):
        for key, (colour, style) in _STYLES.items():
            some = [one for one in results.loads if one.key == key]
            callers = [one.callers for one in some]
            way = some[0].way.replace("`", "")
            latency.plot(callers, [one.p50_ms.median for one in some], style, color=colour)
            rate.plot(
                callers, [one.requests_s.median for one in some], style, color=colour, label=way
            )
        for axes, what in ((latency, "p50, ms"), (rate, "requests a second")):
            axes.set_xscale("log", base=2)
            axes.set_xticks(CALLERS, [str(count) for count in CALLERS])
            axes.set_xlabel("callers at once, a new text each")
            axes.set_ylabel(what)
            axes.set_ylim(bottom=0)
        rate.legend()
    return [_PLOT]


def _head(results: GatewayResults) -> list[str]:
    return head(
        results,
        "The gateway: what it costs, and what it saves",
        "Written by `python -m perf.gateway` (see the README beside this folder); overwritten by "
        "each run. Figures are medians over passes, with the lowest and highest in brackets; new "
        "texts and a known text are measured in turns, pass by pass, and the rest one way after "
        "the other. "
        "**Caller, gateway and Triton share the cores**, and all traffic is on loopback: what one "
        "of them spends, the others lack. The caller is one event loop on raw sockets, and reads "
        "each answer to float32 numbers. The naive FastAPI application is "
        "`perf/gateway_naive.py`: it asks Triton for each request's texts by `AsyncClient`.",
        facts=[("software", f"Triton {results.triton}, Python {results.machine.python}")],
    )


def _loads(results: GatewayResults) -> list[str]:
    alone = results.one("tei", CALLERS[0])
    assert alone.over_ms is not None  # noqa: S101 (tells the type checker)
    over = alone.over_ms
    verdict = "met" if over.median < TARGET_MS else "**not met**"
    return [
        "## New texts",
        f"One text of {TOKENS} tokens a request, none of them twice. The last column is a way's "
        "p50 less that of `AsyncClient`, pass by pass.",
        _load_table(results.loads),
        f"What `/embed` adds to gRPC for a caller alone: {over.show()} ms of p50; wanted below "
        f"{TARGET_MS} ms: {verdict}.",
    ]


def _known(results: GatewayResults) -> list[str]:
    return [
        "## A known text",
        "One text over and over: the gateway remembers it, Triton's response cache answers the "
        "other ways.",
        _load_table(results.known),
    ]


def _load_table(loads: Sequence[Loaded]) -> str:
    return table(
        ["way", "callers", "p50, ms", "p99, ms", "req/s", "over gRPC, ms"],
        [
            (
                one.way,
                str(one.callers),
                one.p50_ms.show(),
                one.p99_ms.show(),
                one.requests_s.show(0),
                "" if one.over_ms is None else one.over_ms.show(),
            )
            for one in loads
        ],
    )


def _batches(results: GatewayResults) -> list[str]:
    return [
        "## A hundred texts, one of them new",
        f"A hundred texts of {TOKENS} tokens a request, of which 99 had been asked for before. "
        "Triton's response cache knows whole requests, the gateway knows texts. Between two of "
        "them comes another caller's text, for the encoder remembers the vectors of its last step.",
        table(
            ["way", "a request, ms", "texts the encoder is asked for"],
            [(one.way, one.ms.show(), f"{one.asked:.2f}") for one in results.batches],
        ),
    ]


def _same(results: GatewayResults) -> list[str]:
    return [
        "## One new text, asked for by all at once",
        f"{CALLERS[-1]} callers ask for the same new text at the same moment. (An encoder that is "
        "asked for it several times in one step, or two, computes it once.)",
        table(
            ["way", "a request, ms", "times the encoder is asked for it"],
            [(one.way, one.ms.show(), f"{one.asked:.2f}") for one in results.same],
        ),
    ]


def _again(results: GatewayResults) -> list[str]:
    return [
        "## Texts that come again",
        f"{DIFFERENT:,} texts of 5-60 words, drawn by Zipf's law (exponent {EXPONENT:g}) by "
        f"{CALLERS[-1]} callers, from an empty memory on. *possible*: the share of requests whose "
        "text had been sent before, so of what a memory without end would answer; some of these "
        "came while the first was still under way, and were merged with it. One run of each way.",
        table(
            ["way", "req/s", "p50, ms", "p99, ms", "requests", "possible", "hit", "merged"],
            [
                (
                    one.way,
                    f"{one.requests_s:,.0f}",
                    f"{one.p50_ms:.2f}",
                    f"{one.p99_ms:.2f}",
                    f"{one.requests:,}",
                    f"{one.possible:.1%}",
                    f"{one.hit:.1%}",
                    "" if one.merged is None else f"{one.merged:.1%}",
                )
                for one in results.again
            ],
        ),
    ]


def _outsets(results: GatewayResults) -> list[str]:
    return [
        "## Start and memory",
        "In front of a Triton that runs already, from the start of the process to its first "
        "vector; PSS in MB (10^6 bytes) after that, and after all of the loads above.",
        table(
            ["application", "start, s", "MB idle", "MB after all"],
            [
                (
                    one.title,
                    one.start_s.show(),
                    one.idle_mb.show(0),
                    f"{one.loaded_mb:.0f}",
                )
                for one in results.outsets
            ],
        ),
    ]
