# SPDX-License-Identifier: Apache-2.0
"""The run's pictures, as PNG files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from perf.load import CONCURRENCIES, LoadResult
from perf.results import Results

BLUE, ORANGE = "#0072b2", "#d55e00"  # told apart by the colour-blind too
_STAGE_COLOURS = ("#56b4e9", "#0072b2", "#e69f00", "#009e73", "#d55e00")
_KINDS = (("mixed", "new texts of 5-60 words", BLUE), ("hit", "one cached text", ORANGE))


def draw(results: Results, folder: Path) -> list[str]:
    """Draws what there are figures for; returns the files' names."""
    drawn = []
    if results.server.loads:
        _latency(results, folder / "latency.png")
        _throughput(results, folder / "throughput.png")
        drawn += ["latency.png", "throughput.png"]
    _memory(results, folder / "memory.png")
    _cold_start(results, folder / "cold_start.png")
    return [*drawn, "memory.png", "cold_start.png"]


def _latency(results: Results, file: Path) -> None:
    with _axes(file, "Latency of a request (gRPC)") as axes:
        for key, title, colour in _KINDS:
            loads = _loads(results, key)
            for percentile, style in (("p50", "-o"), ("p99", "--s")):
                values = [getattr(load, f"{percentile}_ms") for load in loads]
                _line(axes, loads, values, f"{title}, {percentile}", colour, style)
        _over_concurrency(axes, "latency, ms (log scale)")


def _throughput(results: Results, file: Path) -> None:
    with _axes(file, "Requests answered in a second (gRPC, one text each)") as axes:
        for key, title, colour in _KINDS:
            loads = _loads(results, key)
            values = [load.requests_s for load in loads]
            _line(axes, loads, values, title, colour, "-o")
            for load in loads:
                axes.annotate(
                    f"{load.requests_s.median:,.0f}",
                    (load.concurrency, load.requests_s.median),
                    xytext=(0, 8),
                    textcoords="offset points",
                    ha="center",
                    fontsize=9,
                )
        axes.margins(y=0.2)
        _over_concurrency(axes, "requests per second (log scale)")


def _memory(results: Results, file: Path) -> None:
    with _axes(file, "Memory of the server's processes") as axes:
        names = [process.name for process in results.server.loaded]
        series = (
            ("PSS, idle", results.server.idle, "pss_mb", "#a6cee3"),
            ("PSS, after load", results.server.loaded, "pss_mb", BLUE),
            ("RSS, after load", results.server.loaded, "rss_mb", "#bbbbbb"),
        )
        height = 0.8 / len(series)
        for place, (label, processes, field, colour) in enumerate(series):
            values = {process.name: getattr(process, field) for process in processes}
            bars = axes.barh(
                [row + (1 - place) * height for row in range(len(names))],
                [values.get(name, 0.0) for name in names],
                height,
                label=label,
                color=colour,
            )
            axes.bar_label(bars, fmt="%.0f", padding=3, fontsize=8)
        axes.set_yticks(range(len(names)), names)
        axes.set_xlabel("MB (10^6 bytes); shared pages are split among their users in PSS")
        axes.margins(x=0.1)
        axes.legend(loc="lower right")


def _cold_start(results: Results, file: Path) -> None:
    with _axes(file, "Cold start of `arrowhead serve`", height=3.2) as axes:
        reached = 0.0
        stages = results.cold_start.stages()
        for (name, seconds), colour in zip(stages.items(), _STAGE_COLOURS, strict=True):
            label = f"{name}: {seconds:.2f} s"
            axes.barh([0], [seconds], left=reached, height=0.5, color=colour, label=label)
            reached += seconds
        axes.set_yticks([])
        axes.set_ylim(-0.4, 0.4)
        axes.set_xlabel("seconds from the start of the process (medians)")
        axes.figure.legend(loc="outside lower center", ncols=2, fontsize=9)


def _loads(results: Results, key: str) -> list[LoadResult]:
    found = (results.server.load(f"{key}_{n}") for n in CONCURRENCIES)
    return [load for load in found if load is not None]


def _line(
    axes: Any, loads: list[LoadResult], values: list[Any], label: str, colour: str, style: str
) -> None:
    concurrencies = [load.concurrency for load in loads]
    axes.plot(concurrencies, [v.median for v in values], style, label=label, color=colour)
    lows, highs = [v.low for v in values], [v.high for v in values]
    axes.fill_between(concurrencies, lows, highs, color=colour, alpha=0.15)


def _over_concurrency(axes: Any, label: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(CONCURRENCIES, [str(n) for n in CONCURRENCIES])
    axes.minorticks_off()
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(mpl.ticker.FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.set_xlabel("requests in flight at once (bands: all passes)")
    axes.set_ylabel(label)
    axes.legend()


@contextmanager
def _axes(file: Path, title: str, *, height: float = 4.5) -> Iterator[Any]:
    with figure_of(file, size=(8, height)) as (_, (axes,)):
        axes.set_title(title)
        yield axes


@contextmanager
def figure_of(
    file: Path, *, size: tuple[float, float], columns: int = 1
) -> Iterator[tuple[Any, list[Any]]]:
    """A figure and its axes side by side, to be drawn on; written to `file` at the end."""
    # A figure of its own, not pyplot's: no display is looked for.
    figure = Figure(figsize=size, layout="constrained")
    every = list(figure.subplots(1, columns, squeeze=False)[0])
    for axes in every:
        axes.grid(visible=True, alpha=0.3)
        axes.set_axisbelow(True)
    yield figure, every
    figure.savefig(file, dpi=120)
