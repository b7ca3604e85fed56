# SPDX-License-Identifier: Apache-2.0
"""A run's figures as a Markdown page. Every number on it comes from the results."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from perf.common import Run
from perf.load import CONCURRENCIES, LoadResult
from perf.results import Results
from perf.server import ProcessMemory
from perf.targets import targets

DISTURBED = "**Others worked on this machine during the run: read no figure as the server's own.**"


def page(results: Results, plots: Collection[str]) -> str:
    """The whole page, with those of the plots that were drawn."""
    parts = [
        *_head(results),
        *_targets(results),
        *_cold_start(results),
        *picture(plots, "cold_start.png", "Stages of a cold start, in seconds"),
        *_loads(results),
        *picture(plots, "latency.png", "Latency in ms over requests in flight"),
        *picture(plots, "throughput.png", "Requests a second over requests in flight"),
        *_memory(results),
        *picture(plots, "memory.png", "Memory of each process in MB"),
        *_weights(results),
        *_quality(results),
        *_engine(results),
        *_peer(results),
    ]
    return "\n\n".join(parts) + "\n"


def summary(results: Results) -> str:
    """The short form for the project's own README: the machine, and the targets."""
    machine = results.machine
    rows = [(t.what, t.wanted, t.measured, t.verdict) for t in targets(results)]
    cosine = results.closeness[0].worst
    return "\n\n".join(
        [
            f"{machine.cpu}, {machine.cores} cores shared by server and load generator, "
            f"{results.dtype} compute, Triton {results.server.triton}, {machine.date}. "
            f"Worst cosine with sentence-transformers through the server: {cosine:.6f}.",
            *([DISTURBED] if results.is_disturbed else []),
            table(["the specification's target", "wanted", "measured", ""], rows),
        ]
    )


def in_readme(readme: str, figures: str) -> str:
    """The README with the text between its perf markers replaced.

    Raises:
        ValueError: the markers are not there.
    """
    return marked(readme, "perf", figures)


def marked(document: str, name: str, figures: str) -> str:
    """The document with the text between the markers of that name replaced.

    Raises:
        ValueError: the markers are not there.
    """
    before, begin, rest = document.partition(f"<!-- {name}:begin -->\n")
    _, end, after = rest.partition(f"<!-- {name}:end -->")
    if not begin or not end:
        raise ValueError(f"the document has no {name}:begin and {name}:end markers")
    return before + begin + figures + "\n" + end + after


def table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column left, the others right. Bars in cells are escaped."""
    lines = [_row(headers), "|---|" + "---:|" * (len(headers) - 1)]
    return "\n".join([*lines, *(_row(row) for row in rows)])


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def picture(plots: Collection[str], file: str, alt: str) -> list[str]:
    """The image in Markdown, if it was drawn."""
    return [f"![{alt}]({file})"] if file in plots else []


def head(
    run: Run,
    title: str,
    about: str,
    *,
    facts: Sequence[tuple[str, str]] = (),
    between: str = "measurements",
) -> list[str]:
    """A page's title, what is said of its figures, and the table of the machine and the run."""
    machine = run.machine
    rows = [
        ("processor", f"{machine.cpu}, {machine.cores} cores"),
        ("its features", ", ".join(machine.features) or "none of note"),
        ("memory", f"{machine.memory_gb:g} GB"),
        *facts,
        ("kernel", machine.kernel),
        ("Arrowhead", machine.revision),
        ("date", machine.date),
        ("load average before", f"{machine.load_before:.2f}"),
        ("others' work", f"{run.other_work.show(0)} % of the cores, between {between}"),
        ("the run took", f"{run.seconds:.0f} s"),
    ]
    parts = [f"# {title}", about]
    if run.quick:
        parts.append("**A smoke run (`--quick`): too short for its figures to mean much.**")
    if run.is_disturbed:
        parts.append(DISTURBED)
    return [*parts, table(["", ""], rows).replace("---:", "---")]


def _head(results: Results) -> list[str]:
    machine, engine = results.machine, results.engine
    versions = ", ".join(f"{name} {number}" for name, number in machine.versions.items())
    return head(
        results,
        "Measured performance",
        "Written by `python -m perf` (see the README beside this folder); overwritten by each run. "
        "Figures are medians, with the lowest and highest of all passes in brackets. MB are 10^6 "
        "bytes. All traffic is on loopback, and the load generator shares the server's cores.",
        facts=[
            ("computes in", f"{results.dtype} on {engine.device}, {engine.threads} threads"),
            ("software", f"Triton {results.server.triton}, Python {machine.python}, {versions}"),
        ],
    )


def _targets(results: Results) -> list[str]:
    rows = [(t.what, t.wanted, t.measured, t.verdict) for t in targets(results)]
    return [
        "## The specification's targets",
        table(["target", "wanted", "measured", ""], rows),
        "30-40 % smaller counts as met from 30 % on: the file stores "
        f"{', '.join(results.weights.stored_as)} in place of the checkpoint's format. Semantic "
        "accuracy is measured only with `--sts`; it is bounded by what the model itself reaches.",
    ]


def _cold_start(results: Results) -> list[str]:
    cold = results.cold_start
    rows = [
        ("tritonserver runs", cold.triton_s.show()),
        ("both models have their process", cold.stubs_s.show()),
        ("models loaded, certificates proved", cold.loaded_s.show()),
        ('"ready" printed, after an inference of its own', cold.ready_s.show()),
        ("first embedding answered over gRPC", cold.first_answer_s.show()),
    ]
    first, second = cold.first_inference_ms, cold.second_inference_ms
    return [
        "## Cold start",
        f"`arrowhead serve`, median of {cold.first_answer_s.count}, files in the page cache, seen "
        "from outside. Seconds since the process was started:",
        table(["until", "s"], rows),
        f"First inference once ready: {first.show()} ms, connecting included; the next: "
        f"{second.show()} ms.",
    ]


def _loads(results: Results) -> list[str]:
    server = results.server
    if not server.loads:
        return ["## Latency and throughput", _missing(results)]
    single = ["12_miss", "12_miss_http", "hit_1", "32x16_miss", "32x16_hit"]
    sweep = [f"{kind}_{n}" for kind in ("mixed", "hit") for n in CONCURRENCIES]
    return [
        "## Latency and throughput",
        "By perf_analyzer. *New* texts come once in the whole run, so the response cache never "
        "answers; *cached* is one request over and over. Hits and misses are what Triton's own "
        "statistics counted during the runs.",
        "### One request at a time",
        _load_table(results, single),
        *_hit_against_miss(results),
        "### Several at a time (gRPC, one text each)",
        _load_table(results, sweep),
        *[
            f"**{load.key}: both hits and misses; its figures are a mix.**"
            for load in server.loads
            if not load.is_clean
        ],
        *([_missing(results)] if server.loads_missing else []),
        f"Of {server.cache.entries:,} different texts sent once, the cache answered "
        f"{server.cache.held:,} when they came again.",
    ]


def _missing(results: Results) -> str:
    return f"**Not measured:** {results.server.loads_missing}."


def _load_table(results: Results, keys: list[str]) -> str:
    loads = [load for key in keys if (load := results.server.load(key)) is not None]
    rows = [
        (
            f"{load.title}, {'cached' if load.cached else 'new'}",
            load.protocol,
            str(load.concurrency),
            load.p50_ms.show(),
            load.p99_ms.show(),
            load.requests_s.show(0),
            f"{load.hits:,} / {load.misses:,}",
        )
        for load in loads
    ]
    headers = ["request", "over", "in flight", "p50 ms", "p99 ms", "req/s", "hits / misses"]
    return table(headers, rows)


def _hit_against_miss(results: Results) -> list[str]:
    pairs = (("hit_1", "12_miss"), ("32x16_hit", "32x16_miss"))
    rows = []
    for hit_key, miss_key in pairs:
        hit, miss = results.server.load(hit_key), results.server.load(miss_key)
        if hit and miss:
            rows.append(_hit_row(hit, miss))
    headers = ["request", "hit, p50 ms", "miss, p50 ms", "miss / hit"]
    return ["What a hit costs against a miss:", table(headers, rows)]


def _hit_row(hit: LoadResult, miss: LoadResult) -> tuple[str, str, str, str]:
    ratio = miss.p50_ms.median / hit.p50_ms.median
    return hit.title, hit.p50_ms.show(), miss.p50_ms.show(), f"{ratio:.1f}"


def _memory(results: Results) -> list[str]:
    idle = {process.name: process for process in results.server.idle}
    none = ProcessMemory("", 0.0, 0.0)
    rows = [
        _memory_row(process.name, idle.get(process.name, none), process)
        for process in reversed(results.server.loaded)
    ]
    total = _memory_row("**all**", _total(results.server.idle), _total(results.server.loaded))
    return [
        "## Memory",
        "From `/proc/PID/smaps_rollup`, in MB: RSS counts a shared page in full in every process, "
        "PSS splits it, so only PSS may be added up. *Idle*: after the first texts. *After load*: "
        "after all loads, with a full response cache.",
        table(
            ["process", "PSS idle", "PSS after load", "RSS idle", "RSS after load"], [*rows, total]
        ),
    ]


def _memory_row(
    name: str, idle: ProcessMemory, loaded: ProcessMemory
) -> tuple[str, str, str, str, str]:
    values = (idle.pss_mb, loaded.pss_mb, idle.rss_mb, loaded.rss_mb)
    pss_idle, pss_loaded, rss_idle, rss_loaded = (f"{value:.1f}" for value in values)
    return name, pss_idle, pss_loaded, rss_idle, rss_loaded


def _total(processes: list[ProcessMemory]) -> ProcessMemory:
    rss, pss = sum(p.rss_mb for p in processes), sum(p.pss_mb for p in processes)
    return ProcessMemory("", rss, pss)


def _weights(results: Results) -> list[str]:
    weights = results.weights
    rows = [
        ("`WeightFile.open` (mapped, checked)", weights.open_ms.show()),
        ("the same, the very first time", f"{weights.first_open_ms:.2f}"),
        ("`WeightFile.verify` (every checksum)", weights.verify_ms.show()),
        ("`pyarrow.parquet.read_table` of that file", weights.read_table_ms.show()),
        ("`safetensors.torch.load_file` of the checkpoint", weights.safetensors_ms.show()),
    ]
    return [
        "## Weight file",
        f"`weights.parquet` holds {weights.tensors} tensors in {weights.parquet_bytes / 1e6:.1f} "
        f"MB; the checkpoint's `model.safetensors` is {weights.safetensors_bytes / 1e6:.1f} MB: "
        f"{weights.smaller_percent:.1f} % smaller. Both are in the page cache.",
        table(["loading", "ms"], rows),
    ]


def _quality(results: Results) -> list[str]:
    rows = [(c.name, f"{c.worst:.7f}", f"{c.mean:.7f}") for c in results.closeness]
    parts = [
        "## Closeness to the source",
        "Cosine with what sentence-transformers gives in float32, over "
        f"{results.closeness[0].texts} varied texts, some beyond the model's limit:",
        table(["vectors", "worst", "mean"], rows),
    ]
    if results.sts is not None:
        parts.append(
            f"STS, {results.sts.pairs:,} sentence pairs, Spearman x 100: served "
            f"{results.sts.served:.2f}, sentence-transformers in float32 "
            f"{results.sts.reference:.2f}."
        )
    return parts


def _engine(results: Results) -> list[str]:
    engine = results.engine
    rows = [
        (
            f"{one.texts} x {one.tokens}",
            f"{one.dtype}, {engine.engines[one.dtype]}",
            one.ms.show(),
            f"{one.gflops:,.0f}",
            f"{100 * one.fraction:.0f} %",
        )
        for one in engine.engine
    ]
    rates = ", ".join(f"{dtype} {rate:,.0f}" for dtype, rate in engine.matmul_gflops.items())
    return [
        "## Engine in one process",
        "Token ids to embeddings, no server. The last column is the share of the rate that a large "
        f"matrix product reaches at its best in the same run and dtype (GFLOP/s: {rates}).",
        table(["texts x tokens", "dtype, engine", "ms", "GFLOP/s", "of that rate"], rows),
    ]


def _peer(results: Results) -> list[str]:
    rows = [
        (f"{one.texts} x {one.tokens}", name, ms.show(), f"{one.peer_ms.median / ms.median:.2f}")
        for one in results.engine.peer
        for name, ms in (
            ("sentence-transformers, float32", one.peer_ms),
            *((f"Arrowhead, {dtype}", ms) for dtype, ms in one.ours_ms.items()),
        )
    ]
    return [
        "## Beside sentence-transformers",
        "Text to embedding in one process, tokenizing included, taking turns in the same run:",
        table(["texts x tokens", "by", "ms", "times as fast"], rows),
    ]
