# SPDX-License-Identifier: Apache-2.0
"""The peers' page in Markdown. Every number on it comes from the results."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from perf.peers.results import InProcess, PeerResults, ServerResult
from perf.report import head, picture, table
from perf.stats import Sample

_NONE = "-"
_SINGLE = (  # load, percentile, heading
    ("t12", "p50_ms", "12 tokens, p50"),
    ("t12", "p99_ms", "12 tokens, p99"),
    ("t128", "p50_ms", "128 tokens, p50"),
    ("t128", "p99_ms", "128 tokens, p99"),
    ("b32", "p50_ms", "32 texts, p50"),
)


def page(results: PeerResults, plots: Collection[str]) -> str:
    """The whole page, with those of the plots that were drawn."""
    parts = [
        *_head(results),
        *_whole(results),
        *_ratios(results),
        *_one_at_a_time(results),
        *_under_load(results),
        *picture(plots, "peers_latency.png", "Latency in ms over clients, one line a server"),
        *picture(plots, "peers_memory.png", "Memory of each server in MB"),
        *_in_process(results),
        *_roofline(results),
        *picture(plots, "peers_roofline.png", "GFLOP/s of our engine over tokens in a call"),
        *_what_they_do(results),
        *_missing(results),
    ]
    return "\n\n".join(parts) + "\n"


def _head(results: PeerResults) -> list[str]:
    return head(
        results,
        "Beside other servers",
        "Written by `python -m perf.peers` (see the README beside this folder); overwritten by "
        "each run. The same checkpoint, the same texts, the same load generator, the same machine, "
        "on the CPU. Servers take turns, each running alone; passes over all of them: "
        f"{results.passes}; seconds of each load: {results.load_s:g}. Figures are medians of the "
        "passes, with the lowest and highest in brackets. MB are 10^6 bytes. All traffic is on "
        "loopback, and the load generator shares the servers' cores. No text comes twice, so no "
        "cache answers.",
        between="servers",
    )


def _whole(results: PeerResults) -> list[str]:
    mixed = _mixed_keys(results)
    headers = [
        "server",
        "start s",
        "PSS MB",
        "12 tokens p50 / p99 ms",
        "128 tokens p50 ms",
        "32 texts p50 ms",
        f"mixed req/s at {' / '.join(key.removeprefix('mixed_') for key in mixed)} clients",
        "cosine worst / mean",
        *(["STS"] if results.sts_pairs else []),
    ]
    rows = []
    for server in results.servers:
        row = [
            _bold(results, server),
            f"{server.start_s.median:.2f}",
            f"{server.pss_mb.median:,.0f}",
            f"{_ms(server, 't12', 'p50_ms')} / {_ms(server, 't12', 'p99_ms')}",
            _ms(server, "t128", "p50_ms"),
            _ms(server, "b32", "p50_ms"),
            " / ".join(_rate(server, key) for key in mixed),
            _cosines(server),
        ]
        if results.sts_pairs:
            row.append(_NONE if server.sts is None else f"{server.sts:.2f}")
        rows.append(row)
    compared = next((s.closeness.texts for s in results.servers if s.closeness), 0)
    sts = f" *STS*: Spearman x 100 of {results.sts_pairs:,} sentence pairs."
    return [
        "## All servers",
        "*Start*: from the start of the process to the first vector, files in the page cache. "
        "*PSS*: all its processes, after all loads. *12 tokens*, *128 tokens*: one text at a time. "
        "*32 texts*: one request with 32 texts of 16 tokens. *Mixed*: one text of 5-60 words a "
        f"request. *Cosine*: with sentence-transformers in float32, over {compared} varied texts."
        + (sts if results.sts_pairs else ""),
        table(headers, rows),
    ]


def _ratios(results: PeerResults) -> list[str]:
    us = results.us
    if us is None:
        return []
    mixed = _mixed_keys(results)
    headers = [
        "server",
        "memory",
        "start",
        "12 tokens",
        "128 tokens",
        "32 texts",
        *(f"mixed, {key.removeprefix('mixed_')}" for key in mixed),
    ]
    rows = []
    for server in results.servers:
        faster = [_speed(us, server, key, "p50_ms") for key in ("t12", "t128", "b32")]
        more = [_throughput(us, server, key) for key in mixed]
        rows.append(
            [
                _bold(results, server),
                _times(server.pss_mb.median, us.pss_mb.median),
                _times(us.start_s.median, server.start_s.median),
                *faster,
                *more,
            ]
        )
    return [
        f"## Against {us.title}",
        f"How many times as fast as {us.title} (p50, req/s); above 1 is faster than ours. "
        "*Memory*: how many times as much; above 1 is more than ours.",
        table(headers, rows),
    ]


def _one_at_a_time(results: PeerResults) -> list[str]:
    headers = ["server", "start s", *(f"{title} ms" for _, _, title in _SINGLE)]
    rows = [
        [
            _bold(results, server),
            server.start_s.show(),
            *(_shown(server, key, percentile) for key, percentile, _ in _SINGLE),
        ]
        for server in results.servers
    ]
    return ["## One request at a time, with spread", table(headers, rows)]


def _under_load(results: PeerResults) -> list[str]:
    mixed = _mixed_keys(results)
    clients = [key.removeprefix("mixed_") for key in mixed]

    def rows(field: str, digits: int) -> Iterable[list[str]]:
        for server in results.servers:
            yield [
                _bold(results, server),
                *(_shown(server, key, field, digits) for key in mixed),
            ]

    headers = ["server", *(f"{n} clients" if n != "1" else "1 client" for n in clients)]
    return [
        "## Mixed texts, several clients",
        "Requests a second:",
        table(headers, rows("requests_s", 0)),
        "p50, in ms:",
        table(headers, rows("p50_ms", 1)),
        "p99, in ms:",
        table(headers, rows("p99_ms", 1)),
    ]


def _in_process(results: PeerResults) -> list[str]:
    if not results.in_process:
        return []
    shapes = list(results.in_process[0].ms)
    us = next((one for one in results.in_process if one.key == results.against), None)
    parts = [
        "## Without a server",
        "The same encoders in a process each, text to vector, tokenizing included, taking turns. "
        "Milliseconds of a call, by texts x tokens:",
        table(
            ["engine", *shapes],
            [
                [one.title, *(one.ms[shape].show() for shape in shapes)]
                for one in results.in_process
            ],
        ),
    ]
    if us is not None:
        parts += [
            f"How many times as fast as {us.title}:",
            table(
                ["engine", *shapes], [_engine_row(us, one, shapes) for one in results.in_process]
            ),
        ]
    return parts


def _engine_row(us: InProcess, one: InProcess, shapes: list[str]) -> list[str]:
    return [one.title, *(_times(us.ms[s].median, one.ms[s].median) for s in shapes)]


def _roofline(results: PeerResults) -> list[str]:
    engine = results.engine
    if engine is None:
        return []
    rates = ", ".join(f"{dtype} {rate:,.0f}" for dtype, rate in engine.matmul_gflops.items())
    rows = [
        (
            f"{one.texts * one.tokens:,}",
            f"{one.texts} x {one.tokens}",
            one.dtype,
            f"{one.gflops:,.0f}",
            f"{100 * one.fraction:.0f} %",
        )
        for one in engine.engine
    ]
    return [
        "## Our engine against the machine's own rate",
        "Token ids to vectors in one process. The rate is that of a large matrix product at its "
        f"best in the same run (GFLOP/s: {rates}).",
        table(["tokens", "texts x tokens", "dtype", "GFLOP/s", "of that rate"], rows),
    ]


def _what_they_do(results: PeerResults) -> list[str]:
    lines = [f"- **{title}**: {note}" for title, note in results.notes.items()]
    versions = [
        f"- {family}: {', '.join(f'{name} {number}' for name, number in found.items())}"
        for family, found in results.versions.items()
    ]
    return [
        "## What each does to be fast",
        "\n".join(lines),
        "The FastAPI servers run under uvicorn with uvloop and httptools, read requests with "
        "orjson and answer with the vectors' bytes; one thread runs the engine while the event "
        "loop reads and writes. The generator is one asyncio process, with a connection a client "
        "over HTTP and one for all over gRPC.",
        "Installed, an environment each:",
        "\n".join(versions),
    ]


def _missing(results: PeerResults) -> list[str]:
    if not results.missing:
        return []
    lines = [f"- {title}: {reason}" for title, reason in results.missing.items()]
    return ["## Not measured, or not in every pass", "\n".join(lines)]


def _mixed_keys(results: PeerResults) -> list[str]:
    server = results.servers[0] if results.servers else None
    found = [] if server is None else [load.key for load in server.loads]
    return [key for key in found if key.startswith("mixed_")]


def _bold(results: PeerResults, server: ServerResult) -> str:
    return f"**{server.title}**" if server.key == results.against else server.title


def _value(server: ServerResult, key: str, field: str) -> Sample | None:
    load = server.load(key)
    found: Sample | None = getattr(load, field) if load else None
    return found


def _ms(server: ServerResult, key: str, field: str) -> str:
    found = _value(server, key, field)
    return f"{found.median:.2f}" if found else _NONE


def _rate(server: ServerResult, key: str) -> str:
    found = _value(server, key, "requests_s")
    return f"{found.median:,.0f}" if found else _NONE


def _shown(server: ServerResult, key: str, field: str, digits: int = 2) -> str:
    found = _value(server, key, field)
    return found.show(digits) if found else _NONE


def _cosines(server: ServerResult) -> str:
    found = server.closeness
    return f"{found.worst:.6f} / {found.mean:.6f}" if found else _NONE


def _speed(us: ServerResult, server: ServerResult, key: str, field: str) -> str:
    return _quotient(_value(us, key, field), _value(server, key, field))


def _throughput(us: ServerResult, server: ServerResult, key: str) -> str:
    return _quotient(_value(server, key, "requests_s"), _value(us, key, "requests_s"))


def _quotient(above: Sample | None, below: Sample | None) -> str:
    return _times(above.median, below.median) if above and below else _NONE


def _times(above: float, below: float) -> str:
    return f"{above / below:.2f}" if below else _NONE
