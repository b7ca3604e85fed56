# SPDX-License-Identifier: Apache-2.0
"""A profile as a Markdown page. Every number on it comes from the results."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from perf.profile_load import Latency
from perf.profile_results import ProfileResults
from perf.profile_server import Line, Repeated
from perf.profile_time import NO_OP_CLIENTS, SHORT_TOKENS, TimeResults, Where
from perf.report import head, picture, table
from perf.scaling import CLIFF, Point, ScalingResults, Series, Size, Step
from perf.server import ProcessMemory
from perf.stats import Sample


def page(results: ProfileResults, plots: Collection[str]) -> str:
    """The whole page, with those of the plots that were drawn."""
    parts = [*_head(results)]
    if results.time:
        parts += [
            *_time(results.time),
            *picture(plots, "profile_time.png", "Shares of a request's time"),
        ]
    if results.scaling:
        parts += _scaling(results.scaling)
        parts += picture(
            plots, "profile_scaling.png", "Cost of a token over batch, length and model"
        )
    if results.line:
        parts += [
            *_line(results.line),
            *picture(plots, "profile_line.png", "Latency of short texts"),
        ]
    if results.repeated:
        parts += _repeated(results.repeated)
    if results.instances:
        parts += _instances(results)
    return "\n\n".join(parts) + "\n"


def _head(results: ProfileResults) -> list[str]:
    return head(
        results,
        "Where the time goes, and how it grows",
        "Written by `python -m perf.profile` (see the README beside this folder); overwritten by "
        "each run. Figures are medians, with the lowest and highest in brackets. All traffic is on "
        "loopback, and the load generator, one asyncio loop, shares the server's cores. New texts "
        "come once in the whole run, so the response cache never answers them.",
        facts=[
            ("computes in", results.engine),
            (
                "software",
                f"Triton {results.triton or 'not started'}, Python {results.machine.python}",
            ),
        ],
    )


def _time(results: TimeResults) -> list[str]:
    names = list(dict.fromkeys((p.where, p.name) for where in results.where for p in where.parts))
    rows = [
        (place, name, *(_part(where, place, name) for where in results.where))
        for place, name in names
    ]
    rows.append(("**all**", "mean latency", *(f"{w.total_us:,.0f}" for w in results.where)))
    alone, loaded = results.where[0], results.where[1]
    gap = alone.parts[0].us.median
    return [
        "## Where the time goes",
        "Microseconds of a request, as the mean over its load, and the share of what the caller "
        "sees. Triton's own statistics give each model's stages; `infer` is divided by what the "
        "same work takes in this process on idle cores (batches of "
        f"{_batch(alone)} and {_batch(loaded)} texts, the load's own mean). What is then left of "
        "it is the Python backend's way to its process and back, and, under load, waiting for a "
        "core. A request in a batch waits for all of it, so under load a stage holds the whole "
        "batch's time. A part below zero is one that others overlap: a model's output stage goes "
        "on for a moment after the next one has begun, and what took longer in this process than "
        "in the server leaves less than nothing.",
        table(["where", "what", *(where.seen.title for where in results.where)], rows),
        f"Between what the caller sees of one text at a time and what Triton counts lie {gap:,.0f} "
        f"us ({gap / alone.total_us:.0%}): gRPC on both sides, loopback, and the caller's loop. "
        f"Making a request before it is sent takes {alone.seen.built_us.show(0)} us, the text "
        "itself included, and is not in the table.",
        f"What callers see, one text of {SHORT_TOKENS} tokens a request:",
        table(
            ["", "p50 alone, ms", "p99 alone, ms", f"req/s from {NO_OP_CLIENTS} callers"],
            [
                (
                    one.title,
                    one.alone.p50_ms.show(),
                    one.alone.p99_ms.show(),
                    one.several.requests_s.show(0),
                )
                for one in results.overheads
            ]
            + [
                (
                    "a new text, by `Client.embed`",
                    results.client.p50_ms.show(),
                    results.client.p99_ms.show(),
                    "",
                )
            ],
        ),
        f"Loads: {_load(alone)}; {_load(loaded)}.",
    ]


def _part(where: Where, place: str, name: str) -> str:
    found = [part.us for part in where.parts if (part.where, part.name) == (place, name)]
    if not found:
        return ""
    return f"{found[0].show(0)}, {found[0].median / where.total_us:.0%}"


def _batch(where: Where) -> int:
    return where.inside.texts


def _load(where: Where) -> str:
    latency = where.seen.latency
    return (
        f"{where.seen.title}: p50 {latency.p50_ms.show()} ms, p99 {latency.p99_ms.show()} ms, "
        f"longest {latency.most_ms:,.1f} ms, {latency.requests_s.show(0)} req/s, "
        f"{where.seen.batch:.1f} texts in a batch of the encoder"
    )


def _scaling(results: ScalingResults) -> list[str]:
    parts = [
        "## What a token costs",
        "The encoder alone in this process, ids to embeddings, in turns: microseconds of a token. "
        "Neighbours are compared by their lowest figures, which others' work touches least. "
        f"Engines: {', '.join(f'{name} {engine}' for name, engine in results.engine.items())}."
        + "".join(f" No {name}: {why}." for name, why in results.missing.items()),
    ]
    for name in results.names():
        parts += [f"### By {name}", *_grown([s for s in results.series if s.name == name])]
        parts.append(_verdict(results.largest_rise(name)))
    if results.sizes:
        parts += ["### By model size", *_sizes(results.sizes)]
    return parts


def _grown(series: Sequence[Series]) -> list[str]:
    points = series[0].points
    rows = [
        (_shape(point), *(one.points[i].us.show() for one in series))
        for i, point in enumerate(points)
    ]
    return [table(["texts x tokens", *(one.dtype for one in series)], rows)]


def _verdict(step: Step) -> str:
    what = (
        f"Largest rise between neighbours: {step.ratio:.2f} times, from {_shape(step.before)} to "
        f"{_shape(step.after)} in {step.dtype}"
    )
    if step.ratio > CLIFF:
        return f"**A cliff.** {what}; more than {CLIFF} times counts as one."
    return f"No cliff. {what}; more than {CLIFF} times would count as one."


def _shape(point: Point) -> str:
    return f"{point.texts} x {point.tokens}"


def _sizes(sizes: Sequence[Size]) -> list[str]:
    shapes = [_shape(point) for point in sizes[0].points]
    rows = [
        (
            f"{one.width} wide, {one.layers} layers, {one.dtype}",
            f"{one.parameters / 1e6:,.0f}",
            f"{one.load_s:.2f}",
            *(f"{p.us.show(0)}; {gflops(one, p):,.0f}" for p in one.points),
        )
        for one in sizes
    ]
    return [
        "BERTs of random weights, stored as float16. Under a shape of texts x tokens: "
        "microseconds of a token, and billions of operations a second in the linear layers. "
        "Loading is opening and laying out, without the proof that a server asks for.",
        table(["model", "million weights", "load, s", *shapes], rows),
    ]


def gflops(size: Size, point: Point) -> float:
    """Billions of multiplications and additions a second in the linear layers."""
    return 2 * size.parameters / point.us.median / 1e3


def _line(line: Sequence[Line]) -> list[str]:
    rows = [
        (
            one.beside,
            _ms(one.alone),
            *(_ms(one.short, percentile) for percentile in ("p50", "p99")),
            f"{one.short.most_ms:,.1f}",
            f"{one.short.requests_s.median:,.1f}",
            _ms(one.long),
        )
        for one in line
    ]
    return [
        "## Short texts beside long ones",
        f"One caller sends texts of {SHORT_TOKENS} tokens, one after the other, while another "
        "sends requests like the row's, one after the other. Milliseconds.",
        table(
            [
                "the other sends",
                "that alone, p50",
                "short p50",
                "short p99",
                "short, longest",
                "short req/s",
                "the other's, p50",
            ],
            rows,
        ),
    ]


def _ms(latency: Latency | None, percentile: str = "p50") -> str:
    if latency is None:
        return ""
    sample: Sample = getattr(latency, f"{percentile}_ms")
    return sample.show(1)


def _repeated(repeated: Repeated) -> list[str]:
    rows = [
        (
            name,
            f"{third.latency.requests_s.median:,.0f}",
            f"{third.hit_rate:.1%}",
            f"{third.possible:.1%}",
            third.latency.p50_ms.show(),
            third.latency.p99_ms.show(),
        )
        for name, third in zip(("first", "second", "last"), repeated.thirds, strict=True)
    ]
    rate = repeated.hits / max(repeated.hits + repeated.misses, 1)
    counted = repeated.counted_hits / max(repeated.counted_hits + repeated.counted_misses, 1)
    latency = repeated.latency
    return [
        "## Repeated texts",
        f"{repeated.different:,} texts of 5-60 words, drawn by Zipf's law with s = "
        f"{repeated.exponent:g}, {repeated.clients} clients, the cache empty of them at first. "
        f"{latency.requests:,} requests, {latency.requests_s.median:,.0f} req/s, p50 "
        f"{latency.p50_ms.show()} ms, p99 {latency.p99_ms.show()} ms, longest "
        f"{latency.most_ms:,.1f} ms. Hit rate {rate:.1%} by Triton's statistics ({repeated.hits:,} "
        f"hits, {repeated.misses:,} misses), {counted:.1%} by its metrics "
        f"({repeated.counted_hits:,}, {repeated.counted_misses:,}).",
        table(
            ["third of the run", "req/s", "hits", "sent before", "p50, ms", "p99, ms"],
            rows,
        ),
        "*Sent before*: the share of requests whose text had come before, all of which an endless "
        "cache that also knew what is still being computed would answer.",
    ]


def _instances(results: ProfileResults) -> list[str]:
    rows = [
        (
            str(one.count),
            f"{one.first_answer_s:.2f}",
            f"{_pss(one.idle):,.0f}",
            f"{_pss(one.loaded):,.0f}",
            one.mixed.requests_s.show(0),
            one.mixed.p50_ms.show(1),
            one.mixed.p99_ms.show(1),
            *(_ms(one.line.short, percentile) for percentile in ("p50", "p99")),
            _ms(one.line.long),
        )
        for one in results.instances
    ]
    return [
        "## Processes of the encoder",
        "`count` of the encoder's `instance_group`. Memory is PSS of all the server's processes, "
        "in MB (10^6 bytes). The load: new texts of 5-60 words from 32 callers. Then, as above, "
        f"one caller's short texts beside another's: {results.instances[0].line.beside} each.",
        table(
            [
                "count",
                "first embedding, s",
                "PSS idle",
                "PSS after load",
                "req/s",
                "p50, ms",
                "p99, ms",
                "short p50",
                "short p99",
                "the other's, p50",
            ],
            rows,
        ),
    ]


def _pss(memory: Sequence[ProcessMemory]) -> float:
    return sum(process.pss_mb for process in memory)
