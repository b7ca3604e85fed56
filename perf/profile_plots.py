# SPDX-License-Identifier: Apache-2.0
"""A profile's pictures, as PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from perf.profile_results import ProfileResults
from perf.profile_server import Line
from perf.profile_time import TimeResults, Where
from perf.scaling import ScalingResults, Series, Size

# Told apart by the colour-blind too.
_COLOURS = {"float32": "#0072b2", "bfloat16": "#009e73", "int8": "#d55e00"}
_PLACES = ("#999999", "#e69f00", "#56b4e9", "#cc79a7")  # client, ensemble, tokenizer, encoder
_LEAST = 0.004  # shares below it are not drawn apart


def draw(results: ProfileResults, folder: Path) -> list[str]:
    """Draws what there are figures for; returns the files' names."""
    drawn = []
    if results.time:
        _time(results.time, folder / "profile_time.png")
        drawn.append("profile_time.png")
    if results.scaling:
        _scaling(results.scaling, folder / "profile_scaling.png")
        drawn.append("profile_scaling.png")
    if results.line:
        _line(results.line, folder / "profile_line.png")
        drawn.append("profile_line.png")
    return drawn


def _time(results: TimeResults, file: Path) -> None:
    figure = Figure(figsize=(10, 6), layout="constrained")
    axes = figure.subplots()
    names = list(dict.fromkeys((p.where, p.name) for where in results.where for p in where.parts))
    colours = _shades(names)
    for row, where in enumerate(results.where):
        reached = 0.0
        for key in names:
            share = _share(where, key)
            if share < _LEAST:
                continue
            label = ": ".join(key)
            axes.barh(
                [row], [share], left=reached, height=0.6, color=colours[key], label=label,
                edgecolor="white", linewidth=0.5,
            )  # fmt: skip
            if share > 0.04:
                axes.text(
                    reached + share / 2, row, f"{share:.0%}", ha="center", va="center", fontsize=8
                )
            reached += share
    axes.set_yticks(
        range(len(results.where)),
        [f"{where.seen.title}\n{where.total_us / 1e3:,.2f} ms" for where in results.where],
    )
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter(mpl.ticker.PercentFormatter(1.0))
    axes.set_title("Shares of a request's mean latency (where parts overlap, beyond 100 %)")
    handles, labels = axes.get_legend_handles_labels()
    order = [": ".join(key) for key in names]
    unique = dict(zip(labels, handles, strict=True))
    shown = [label for label in order if label in unique]
    figure.legend(
        [unique[label] for label in shown], shown, loc="outside lower center", ncols=3, fontsize=8
    )
    figure.savefig(file, dpi=120)


def _share(where: Where, key: tuple[str, str]) -> float:
    found = [part.us.median for part in where.parts if (part.where, part.name) == key]
    return max(found[0], 0.0) / where.total_us if found else 0.0


def _shades(names: Sequence[tuple[str, str]]) -> dict[tuple[str, str], Any]:
    """One colour a place, one shade of it a part."""
    places = list(dict.fromkeys(place for place, _ in names))
    shades = {}
    for place, colour in zip(places, _PLACES, strict=False):
        own = [key for key in names if key[0] == place]
        for i, key in enumerate(own):
            red, green, blue = mpl.colors.to_rgb(colour)
            lighter = 0.75 * i / len(own)
            shades[key] = tuple(c + (1 - c) * lighter for c in (red, green, blue))
    return shades


def _scaling(results: ScalingResults, file: Path) -> None:
    figure = Figure(figsize=(11, 11), layout="constrained")
    grid = figure.subplots(3, 2).ravel()
    for axes, name in zip(grid, results.names(), strict=False):
        _grown(axes, name, [one for one in results.series if one.name == name])
    if results.sizes:
        _sizes(grid[-1], results.sizes)
    for axes in grid[len(results.names()) : -1 if results.sizes else None]:
        axes.set_axis_off()
    figure.savefig(file, dpi=120)


def _grown(axes: Any, name: str, series: Sequence[Series]) -> None:
    by_batch = name.startswith("batch")
    for one in series:
        x = [point.texts if by_batch else point.tokens for point in one.points]
        colour = _COLOURS[one.dtype]
        lowest, medians = [p.us.low for p in one.points], [p.us.median for p in one.points]
        axes.plot(x, lowest, "-o", ms=3, label=one.dtype, color=colour)
        axes.fill_between(x, lowest, medians, color=colour, alpha=0.15)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(mpl.ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_ylim(bottom=0)
    axes.set_title(name)
    axes.set_xlabel("texts" if by_batch else "tokens of a text")
    axes.set_ylabel("us per token (bands: up to the median)")
    axes.grid(visible=True, alpha=0.3)
    axes.legend()


def _sizes(axes: Any, sizes: Sequence[Size]) -> None:
    styles = ("-o", "--s", ":^", "-.d")
    for dtype, colour in _COLOURS.items():
        own = [one for one in sizes if one.dtype == dtype]
        for i, style in zip(range(len(own[0].points) if own else 0), styles, strict=False):
            point = own[0].points[i]
            axes.plot(
                [one.parameters / 1e6 for one in own],
                [one.points[i].us.low for one in own],
                style,
                ms=4,
                color=colour,
                label=f"{dtype}, {point.texts} x {point.tokens}",
            )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_title("model size")
    axes.set_xlabel("million weights in linear layers")
    axes.set_ylabel("us per token (log scale)")
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize=7)


def _line(line: Sequence[Line], file: Path) -> None:
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / 3
    kinds = (("p50", "#56b4e9"), ("p99", "#0072b2"), ("longest", "#d55e00"))
    for place, (kind, colour) in enumerate(kinds):
        values = [
            one.short.most_ms if kind == "longest" else getattr(one.short, f"{kind}_ms").median
            for one in line
        ]
        rows = [row + (place - 1) * height for row in range(len(line))]
        bars = axes.barh(rows, values, height, label=kind, color=colour)
        axes.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
    axes.set_yticks(range(len(line)), [one.beside for one in line])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.margins(x=0.15)
    axes.set_xlabel("latency of short texts, ms (log scale)")
    axes.set_title("Short texts beside ...")
    axes.legend()
    axes.grid(visible=True, axis="x", alpha=0.3)
    figure.savefig(file, dpi=120)
