# SPDX-License-Identifier: Apache-2.0
"""The pictures beside the peers' page, as PNG files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

from perf.peers.results import Loaded, PeerResults, ServerResult
from perf.plots import BLUE, ORANGE, figure_of

_MARKS = "os^Dvx*P<>h"


def draw(results: PeerResults, folder: Path) -> list[str]:
    """Draws what there are figures for; returns the files' names."""
    drawn = []
    if results.servers:
        _latency(results, folder / "peers_latency.png")
        _memory(results, folder / "peers_memory.png")
        drawn += ["peers_latency.png", "peers_memory.png"]
    if results.engine is not None:
        _roofline(results, folder / "peers_roofline.png")
        drawn.append("peers_roofline.png")
    return drawn


def _latency(results: PeerResults, file: Path) -> None:
    with figure_of(file, size=(11, 5.5), columns=2) as (figure, both):
        for axes, field in zip(both, ("p50_ms", "p99_ms"), strict=True):
            for place, server in enumerate(results.servers):
                _curve(axes, server, field, place)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(mpl.ticker.LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(mpl.ticker.FuncFormatter(lambda v, _: f"{v:,g}"))
            axes.set_xlabel("clients at once, new texts of 5-60 words")
            axes.set_ylabel("ms (log scale)")
            axes.set_title(f"Latency, {field.removesuffix('_ms')}")
            clients = sorted({load.clients for s in results.servers for load in _mixed(s)})
            axes.set_xticks(clients, [str(n) for n in clients])
            axes.minorticks_off()
        handles, labels = both[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9)


def _curve(axes: Any, server: ServerResult, field: str, place: int) -> None:
    loads = _mixed(server)
    axes.plot(
        [load.clients for load in loads],
        [getattr(load, field).median for load in loads],
        "-" if server.ours else ":",
        marker=_MARKS[place % len(_MARKS)],
        linewidth=2.4 if server.ours else 1.4,
        color=mpl.colormaps["tab20"](place % 20),
        label=server.title,
    )


def _mixed(server: ServerResult) -> list[Loaded]:
    return [load for load in server.loads if load.key.startswith("mixed_")]


def _memory(results: PeerResults, file: Path) -> None:
    # Both protocols of ours are one server.
    servers = [server for server in results.servers if server.closeness is not None][::-1]
    with figure_of(file, size=(9, 1.2 + 0.4 * len(servers))) as (_, (axes,)):
        values = [server.pss_mb.median for server in servers]
        colours = [BLUE if server.ours else "#bbbbbb" for server in servers]
        names = [server.title.removesuffix(", gRPC") for server in servers]
        bars = axes.barh(names, values, color=colours)
        axes.bar_label(bars, fmt="%.0f", padding=3, fontsize=9)
        axes.margins(x=0.12)
        axes.set_xlabel("MB, PSS of all processes after all loads (medians)")
        axes.set_title("Memory of each server")


def _roofline(results: PeerResults, file: Path) -> None:
    engine = results.engine
    assert engine is not None  # noqa: S101 (tells the type checker)
    with figure_of(file, size=(8, 4.5)) as (_, (axes,)):
        colours = (BLUE, ORANGE, "#009e73", "#cc79a7")
        for colour, (dtype, rate) in zip(colours, engine.matmul_gflops.items(), strict=False):
            axes.axhline(rate, linestyle="--", color=colour, label=f"{dtype}: a large product")
            found = sorted(
                (one for one in engine.engine if one.dtype == dtype),
                key=lambda one: (one.texts * one.tokens, one.gflops),
            )
            tokens = [one.texts * one.tokens for one in found]
            line = [one.gflops for one in found]
            axes.plot(tokens, line, "-o", color=colour, label=f"{dtype}: our engine")
            for one, where in zip(found, tokens, strict=True):
                axes.annotate(
                    f"{one.texts} x {one.tokens}",
                    (where, one.gflops),
                    xytext=(6, -11),
                    textcoords="offset points",
                    fontsize=8,
                )
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(mpl.ticker.FuncFormatter(lambda value, _: f"{value:,g}"))
        axes.set_ylim(bottom=0)
        axes.set_xlabel("tokens in a call (texts x tokens of each)")
        axes.set_ylabel("GFLOP/s")
        axes.set_title("Our engine beside this machine's own matrix rate")
        axes.legend()
