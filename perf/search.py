# SPDX-License-Identifier: Apache-2.0
"""`python -m perf.search --retrieval DIR`: an index of documents, and searching it, as a page.

1. The index is built through a running server, and built again with nothing to do.
2. What is found: nDCG@10 and recall, exact and by an index of vectors, beside whole documents.
3. How quick: queries a second, embedding included and the store alone, by 1 and 8 callers.
4. A larger table of made-up vectors: what the index of vectors finds of it, and how quickly.

The peer is brute force: one numpy product of the query with the same vectors, in this process.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click
import numpy as np
import pyarrow as pa

from arrowhead_client import Document, Index
from arrowhead_client import measures as m
from arrowhead_client._algebra import normalize
from arrowhead_client._arrow import to_arrow
from arrowhead_client._passages import MOST_CHARS
from arrowhead_client._store import (
    EXACT_UNTIL,
    HASH,
    HASH_BYTES,
    ID,
    PART,
    TEXT,
    VECTOR,
    Description,
    Store,
)
from arrowhead_client.datasets import RetrievalSet
from perf.common import Run, common_options, end_as_ctrl_c_does
from perf.machine import Bystanders, describe
from perf.report import head, table
from perf.server import ServeFailed, served
from perf.stats import Sample, Vectors, elapsed_ms

WANTED_NDCG = 64.3  # of the project; the model's own is 64.51
CALLERS = (1, 8)
ROUNDS = 3
HITS = 100
_QUICK_DOCUMENTS, _QUICK_QUERIES = 300, 40
_LARGER = {False: 200_000, True: 20_000}  # passages; by `quick`
_NOISE = 0.03  # added to each component: a cosine of about 0.86 with what it was
_AT_ONCE = 10_000
_TIMED = 50  # queries to the larger table


@dataclass(frozen=True)
class Built:
    """One build.

    Attributes:
        seconds: through the server. again_s: the same once more, with nothing to embed.
        vectors_mb, disk_mb: of the vectors alone, and of the folder; MB (10^6 bytes).
    """

    documents: int
    passages: int
    seconds: float
    again_s: float
    vectors_mb: float
    disk_mb: float


@dataclass(frozen=True)
class Quality:
    """What one way of searching finds: percent, means over the queries.

    Attributes:
        same: of the exact search's first ten documents, those that are among this one's.
    """

    way: str
    ndcg: float
    recall_10: float
    recall_100: float
    same: float


@dataclass(frozen=True)
class Speed:
    """Queries a second of so many callers, and milliseconds of one query."""

    way: str
    callers: int
    queries_s: Sample
    p50_ms: Sample


@dataclass(frozen=True)
class Larger:
    """A larger table: the vectors of the set, each many times, with noise; no texts.

    Attributes:
        same: of numpy's first ten passages, the percent among the index of vectors' first ten.
        exact_ms, indexed_ms, numpy_ms: of one query, its vector given.
    """

    passages: int
    indexed_s: float
    same: float
    exact_ms: Sample
    indexed_ms: Sample
    numpy_ms: Sample


@dataclass(frozen=True)
class SearchResults(Run):
    """All of it."""

    source: str
    queries: int
    built: Built
    indexed_s: float
    quality: list[Quality]
    speeds: list[Speed]
    larger: Larger


@click.command()
@click.option("--quick", is_flag=True, help="A part of the set; the figures are rough.")
@click.option(
    "--retrieval",
    metavar="DIR",
    required=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="As for `arrowhead evaluate --retrieval`.",
)
@common_options
def main(quick: bool, retrieval: Path, repository: Path, out: Path) -> None:
    """Measure building and searching an index, beside brute force in numpy."""
    end_as_ctrl_c_does()
    data = RetrievalSet.read(retrieval)
    try:
        results = measure(_part(data) if quick else data, retrieval.name, repository, quick=quick)
    except ServeFailed as error:
        raise click.ClickException(str(error)) from error
    out.mkdir(parents=True, exist_ok=True)
    (out / "search.json").write_text(results.to_json(), encoding="utf-8")
    (out / "search.md").write_text(page(results), encoding="utf-8")
    click.echo(f"{results.seconds:.0f} s; {out / 'search.md'}")


def measure(data: RetrievalSet, source: str, repository: Path, *, quick: bool) -> SearchResults:
    """Everything, on a server of its own."""
    began, machine, others = time.monotonic(), describe(), Bystanders()
    rounds = 1 if quick else ROUNDS
    with (
        tempfile.TemporaryDirectory(prefix="arrowhead-search-") as folder,
        served(repository) as server,
        server.client() as client,
    ):
        others.look()
        click.echo("build", err=True)
        index = Index.create(Path(folder) / "index", client)
        built = _build(index, data)
        others.look()
        click.echo("search", err=True)
        store = Store.open(index.path)
        vectors, owners = _vectors(store)
        queries = client.embed(data.queries, input_type="query")
        exact = _through(index, data)
        quality = [
            _quality("index, exact", exact, exact, data),
            _quality("numpy, the same passages", _brute(queries, vectors, owners), exact, data),
        ]
        documents = client.embed(data.documents, input_type="document")
        whole = m.search(queries, [documents], HITS)
        quality.append(_quality("numpy, whole documents", whole, exact, data))
        ways = _ways(index, store, queries, vectors, data.queries)
        speeds = _speeds(ways, len(data.queries), rounds, others)
        start = time.perf_counter()
        store.index_vectors()
        indexed_s = time.perf_counter() - start
        quality.insert(1, _quality("index of vectors", _through(index, data), exact, data))
        again = {
            f"{way}, index of vectors": call for way, call in ways.items() if "numpy" not in way
        }
        speeds += _speeds(again, len(data.queries), rounds, others)
        others.look()
        click.echo("a larger table", err=True)
        larger = _larger(Path(folder) / "larger", vectors, queries, _LARGER[quick])
    return SearchResults(
        machine=machine,
        quick=quick,
        seconds=time.monotonic() - began,
        other_work=Sample.of(others.percent),
        source=source,
        queries=len(data.queries),
        built=built,
        indexed_s=indexed_s,
        quality=quality,
        speeds=speeds,
        larger=larger,
    )


def _larger(path: Path, vectors: Vectors, queries: Vectors, passages: int) -> Larger:
    width, made = vectors.shape[1], np.random.default_rng(1)
    store, blocks = Store.create(path, Description("noise", "", width)), []
    for start in range(0, passages, _AT_ONCE):
        count = min(_AT_ONCE, passages - start)
        block = vectors[made.integers(0, len(vectors), count)]
        block = normalize(block + _NOISE * made.standard_normal(block.shape, np.float32))
        columns = {
            ID: pa.array(f"{number}" for number in range(start, start + count)),
            TEXT: pa.array([""] * count),
            PART: pa.array([0] * count, pa.int32()),
            HASH: pa.array([bytes(HASH_BYTES)] * count, pa.binary(HASH_BYTES)),
            VECTOR: to_arrow(block),
        }
        store.put(pa.table(columns, schema=store.schema), [])
        blocks.append(block)
    wanted = m.search(queries, blocks, 10)
    some, all_of_them = queries[:_TIMED], np.concatenate(blocks)

    def timed(call: Callable[[Vectors], object]) -> Sample:
        call(some[0])
        return Sample.of([elapsed_ms(partial(call, query)) for query in some])

    exact_ms = timed(lambda query: store.search(query, 30, None))
    numpy_ms = timed(lambda query: np.argpartition(-(all_of_them @ query), 30)[:30])
    indexed_s = elapsed_ms(store.index_vectors) / 1e3
    found = [{int(row[ID]) for row in store.search(query, 10, None)} for query in queries]
    same = [len(f & set(w)) / 10 for f, w in zip(found, wanted.tolist(), strict=True)]
    return Larger(
        passages,
        indexed_s,
        100 * float(np.mean(same)),
        exact_ms,
        timed(lambda query: store.search(query, 30, None)),
        numpy_ms,
    )


def _part(data: RetrievalSet) -> RetrievalSet:
    """The documents that a few queries are judged on, and some others."""
    judged, few = data.judged[:_QUICK_QUERIES], min(_QUICK_DOCUMENTS, len(data.documents))
    kept = sorted({number for row in judged for number in row} | set(range(few)))
    place = {old: new for new, old in enumerate(kept)}
    return RetrievalSet(
        [data.documents[old] for old in kept],
        data.queries[:_QUICK_QUERIES],
        [{place[number]: gain for number, gain in row.items()} for row in judged],
        [None if one is None else place.get(one) for one in data.own[:_QUICK_QUERIES]],
    )


def _build(index: Index, data: RetrievalSet) -> Built:
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        index.add(Document(f"{n}", text) for n, text in enumerate(data.documents))
        seconds.append(time.perf_counter() - start)
    store = Store.open(index.path)
    passages, width = store.passages(), store.description.dimension
    return Built(
        documents=len(index),
        passages=passages,
        seconds=seconds[0],
        again_s=seconds[1],
        vectors_mb=passages * width * 4 / 1e6,
        disk_mb=store.size_bytes() / 1e6,
    )


def _vectors(store: Store) -> tuple[Vectors, m.Hits]:
    """The vectors [P, D] of all passages, of length 1, and whose they are [P]."""
    rows = store.rows([f"{n}" for n in range(store.documents())], ["id", VECTOR])
    flat = rows[VECTOR].combine_chunks().flatten().to_numpy()
    vectors = flat.reshape(rows.num_rows, -1)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return unit, np.array(rows["id"].to_pylist()).astype(np.int64)


def _through(index: Index, data: RetrievalSet) -> m.Hits:
    """The documents that the index finds, [N, HITS]."""
    found = np.full((len(data.queries), HITS), m.NO_HIT, np.int64)
    for row, query in zip(found, data.queries, strict=True):
        hits = [int(hit.id) for hit in index.search(query, limit=HITS)]
        row[: len(hits)] = hits
    return found


def _brute(queries: Vectors, vectors: Vectors, owners: m.Hits) -> m.Hits:
    """The documents of the best passages, [N, HITS]."""
    scores = np.full((len(queries), int(owners.max()) + 1), -np.inf, np.float32)
    for row, query in zip(scores, queries, strict=True):
        np.maximum.at(row, owners, vectors @ query)
    return np.argsort(-scores, axis=1, kind="stable")[:, :HITS]


def _quality(way: str, hits: m.Hits, exact: m.Hits, data: RetrievalSet) -> Quality:
    found = m.gains(hits, data.judged)
    same = [
        len(set(a[a != m.NO_HIT]) & set(b)) / max(1, (a != m.NO_HIT).sum())
        for a, b in zip(exact[:, :10], hits[:, :10], strict=True)
    ]
    return Quality(
        way,
        100 * float(m.ndcg(found, data.judged, 10).mean()),
        100 * float(m.recall(found, data.judged, 10).mean()),
        100 * float(m.recall(found, data.judged, HITS).mean()),
        100 * float(np.mean(same)),
    )


def _ways(
    index: Index, store: Store, queries: Vectors, vectors: Vectors, texts: Sequence[str]
) -> dict[str, Callable[[int, int], object]]:
    """What is timed, each called with the number of a query and of a round."""

    def end_to_end(number: int, turn: int) -> object:
        # Never the same text twice: else Triton's cache answers, not the model.
        return index.search(f"{texts[number]} {turn}")

    def brute(number: int, turn: int) -> object:
        scores = vectors @ queries[number]
        best = np.argpartition(-scores, min(30, len(scores) - 1))[:30]
        return best[np.argsort(-scores[best])]

    return {
        "text to hits": end_to_end,
        "vector to passages": lambda number, turn: store.search(queries[number], 30, None),
        "vector to passages, numpy": brute,
    }


def _speeds(
    ways: dict[str, Callable[[int, int], object]], count: int, rounds: int, others: Bystanders
) -> list[Speed]:
    """Each way by each number of callers, in turns."""
    rates: dict[tuple[str, int], list[float]] = {}
    p50s: dict[tuple[str, int], list[float]] = {}
    turn = int(time.time() * 1000)
    for _ in range(rounds):
        others.look()
        for callers in CALLERS:
            for way, call in ways.items():
                turn += 1
                rate, p50 = _run(call, callers, count, turn)
                rates.setdefault((way, callers), []).append(rate)
                p50s.setdefault((way, callers), []).append(p50)
    return [
        Speed(way, callers, Sample.of(found), Sample.of(p50s[way, callers]))
        for (way, callers), found in rates.items()
    ]


def _run(
    call: Callable[[int, int], object], callers: int, count: int, turn: int
) -> tuple[float, float]:
    """Queries a second, and the median of their milliseconds."""
    with ThreadPoolExecutor(callers) as pool:
        began = time.perf_counter()
        taken = list(pool.map(lambda n: elapsed_ms(lambda: call(n, turn)), range(count)))
        return count / (time.perf_counter() - began), Sample.of(taken).median


def page(results: SearchResults) -> str:
    """The page; every number on it comes from the results."""
    built = results.built
    parts = [
        *head(
            results,
            "Search",
            "Written by `python -m perf.search`; overwritten by each run. Figures are medians, "
            "with the lowest and highest in brackets.",
            facts=[
                ("set", results.source),
                ("queries", f"{results.queries:,}"),
                ("nDCG@10 x 100", f"{results.quality[0].ndcg:.2f} (wanted: {WANTED_NDCG})"),
            ],
        ),
        "## The index",
        table(
            ["", ""],
            [
                ("documents", f"{built.documents:,}"),
                (f"passages, of at most {MOST_CHARS:,} characters", f"{built.passages:,}"),
                ("built, s", f"{built.seconds:.1f}"),
                ("documents a second", f"{built.documents / built.seconds:,.0f}"),
                ("built again, nothing to embed, s", f"{built.again_s:.1f}"),
                ("index of vectors made, s", f"{results.indexed_s:.1f}"),
                ("folder, MB, before that", f"{built.disk_mb:.1f}"),
                ("of it vectors, MB", f"{built.vectors_mb:.1f}"),
            ],
        ),
        "## What is found",
        f"The index of vectors is otherwise made above {EXACT_UNTIL:,} passages; here it was made "
        "all the same. Below some 260,000 passages it looks at each of them, and saves by reading "
        "one byte a component; above, it looks at a part only.",
        table(
            ["", "nDCG@10", "recall@10", "recall@100", "of the exact first ten, %"],
            [
                (
                    one.way,
                    f"{one.ndcg:.2f}",
                    f"{one.recall_10:.2f}",
                    f"{one.recall_100:.2f}",
                    f"{one.same:.2f}",
                )
                for one in results.quality
            ],
        ),
        "## How quick",
        "Text to hits: ten hits with their snippets, of texts that the server has never seen. "
        "Vector to passages: the first 30, without embedding. Callers are threads of one process, "
        "on the cores that the server has.",
        table(
            ["", "callers", "queries/s", "p50, ms"],
            [
                (one.way, f"{one.callers}", one.queries_s.show(), one.p50_ms.show())
                for one in results.speeds
            ],
        ),
        "## A larger table",
        f"The vectors of these passages, drawn at random {results.larger.passages:,} times, each "
        f"with noise (of {_NOISE} a component) and made of length 1 again; without texts. One "
        "caller, vector to passages.",
        table(
            ["", ""],
            [
                ("exact, ms", results.larger.exact_ms.show()),
                ("index of vectors, ms", results.larger.indexed_ms.show()),
                ("numpy, ms", results.larger.numpy_ms.show()),
                ("of numpy's first ten, in the index of vectors', %", f"{results.larger.same:.2f}"),
                ("index of vectors made, s", f"{results.larger.indexed_s:.1f}"),
            ],
        ),
    ]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    main()
