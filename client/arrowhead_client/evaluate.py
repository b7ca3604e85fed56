# SPDX-License-Identifier: Apache-2.0
"""`arrowhead evaluate`: scores a model on sentence pairs and on retrieval.

    datasets.py (files) -> `score_sts`, `score_retrieval` (texts to vectors, here) -> measures.py

The two functions take any `embed`: a served model's, or an engine's in the same process.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, get_args

import click
import numpy as np
from tqdm import tqdm

from arrowhead_client import Client
from arrowhead_client import measures as m
from arrowhead_client._algebra import Precision, Vectors, dequantize
from arrowhead_client.commands import RETRIES, url_option
from arrowhead_client.datasets import RetrievalSet, StsPairs

# Texts in, vectors [N, D] out.
Embed: TypeAlias = Callable[[Sequence[str]], Vectors]

HITS = 100  # of a query: recall is measured there
BLOCK = 4096  # documents embedded and searched at once: the vectors of a corpus in memory
_STEP = 256  # texts sent between two moves of the progress bar


@dataclass(frozen=True)
class Score:
    """One measure of one set.

    Attributes:
        measure: its name.
        value: percent, 0..100 (Spearman: -100..100).
        texts: how many were embedded for the set.
        seconds: how long embedding them took; all measures of a set share it.
    """

    measure: str
    value: float
    texts: int
    seconds: float

    @property
    def texts_per_s(self) -> float:
        """Texts embedded in a second."""
        return self.texts / self.seconds


def score_sts(pairs: StsPairs, embed: Embed) -> list[Score]:
    """Spearman x 100 of the cosines of the pairs with people's scores, as MTEB reports it.

    Raises:
        InvalidInput: all scores, or all cosines, are equal.
    """
    timed = _Timed(embed)
    return [timed.score("STS Spearman", pairs.percent(timed(pairs.left), timed(pairs.right)))]


def score_retrieval(
    data: RetrievalSet, embed_query: Embed, embed_document: Embed | None = None
) -> list[Score]:
    """nDCG@10, recall@100 and MRR@10, x 100, of an exact search by cosine; means over the queries.

    Args:
        data: what to search.
        embed_query: embeds queries.
        embed_document: embeds documents, `BLOCK` at a time; the default is `embed_query`.
    """
    queries, documents = _Timed(embed_query), _Timed(embed_document or embed_query)
    blocks = _blocks(data.documents, documents)
    # One more than is measured: a query's own document is taken out.
    hits = m.search(queries(data.queries), blocks, HITS + 1)
    found = m.gains(_without(hits, data.own), data.judged)
    timed = queries + documents
    return [
        timed.score("nDCG@10", 100 * m.ndcg(found, data.judged, 10).mean()),
        timed.score(f"recall@{HITS}", 100 * m.recall(found, data.judged, HITS).mean()),
        timed.score("MRR@10", 100 * m.reciprocal_rank(found, 10).mean()),
    ]


class _Timed:
    """An `embed` that knows how many texts it was given, and how long they took."""

    def __init__(self, embed: Embed, texts: int = 0, seconds: float = 0.0) -> None:
        self._embed, self.texts, self.seconds = embed, texts, seconds

    def __call__(self, texts: Sequence[str]) -> Vectors:
        began = time.perf_counter()
        vectors = self._embed(texts)
        self.seconds += time.perf_counter() - began
        self.texts += len(texts)
        return vectors

    def __add__(self, other: _Timed) -> _Timed:
        return _Timed(self._embed, self.texts + other.texts, self.seconds + other.seconds)

    def score(self, measure: str, value: float) -> Score:
        return Score(measure, float(value), self.texts, self.seconds)


def _blocks(texts: Sequence[str], embed: Embed) -> Iterator[Vectors]:
    return (embed(texts[start : start + BLOCK]) for start in range(0, len(texts), BLOCK))


def _without(hits: m.Hits, own: Sequence[int | None]) -> m.Hits:
    """The hits [N, K] without each query's own document, [N, K - 1]."""
    rows = [
        [hit for hit in row if hit != mine][: hits.shape[1] - 1]
        for row, mine in zip(hits.tolist(), own, strict=True)
    ]
    return np.array(rows, np.int64)


@click.command()
@click.argument("name")
@click.option(
    "--sts",
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="CSV of sentence1,sentence2,score, with or without that line on top.",
)
@click.option(
    "--retrieval",
    metavar="DIR",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder in BEIR's layout (corpus.jsonl, queries.jsonl, qrels/test.tsv), or with one each "
    "of *.corpus.parquet, *.queries.parquet, *.qrels.test.tsv.",
)
@click.option("--query-prompt", help='Put in front of each query, such as "query: ".')
@click.option("--document-prompt", help='Put in front of each document, such as "passage: ".')
@click.option("--sts-prompt", help="Put in front of each sentence of --sts.")
@click.option(
    "--precision",
    type=click.Choice(get_args(Precision)),
    default="float32",
    show_default=True,
    help="Score vectors that were stored so, and read back.",
)
@click.option("--dimensions", type=int, help="Score vectors cut to so many components.")
@url_option
@click.option("--json", "as_json", is_flag=True, help="JSON in place of the table.")
def evaluate(
    name: str,
    sts: Path | None,
    retrieval: Path | None,
    query_prompt: str | None,
    document_prompt: str | None,
    sts_prompt: str | None,
    precision: Precision,
    dimensions: int | None,
    url: str,
    as_json: bool,
) -> None:
    """Score the served model NAME on data with known answers.

    --sts compares the cosines of sentence pairs with people's scores: Spearman's rank correlation.
    --retrieval searches a corpus for the documents that people found relevant to a query: nDCG@10,
    recall@100 and MRR@10, by exact search over title and text. All values are x 100, as MTEB and
    BEIR report them. At least one of the two is needed.

    The texts go through the running server as a caller's would. A text that its response cache
    holds is answered from there: for texts/s as a measurement, run it on a fresh server.

    \b
    Examples:
      arrowhead evaluate minilm --sts stsb-en-test.csv
      arrowhead evaluate minilm --retrieval datasets/scifact
      arrowhead evaluate minilm --sts stsb.csv --retrieval datasets/scifact --json > scores.json
      arrowhead evaluate e5 --retrieval datasets/scifact \\
          --query-prompt "query: " --document-prompt "passage: "
      arrowhead evaluate minilm --sts stsb-en-test.csv --precision int8
    """  # noqa: D301 (click reads the character)
    if sts is None and retrieval is None:
        raise click.UsageError("nothing to score on: give --sts FILE, --retrieval DIR, or both")
    # Both are read before anything is embedded: an error in the second must not cost the first.
    pairs = StsPairs.read(sts) if sts else None
    data = RetrievalSet.read(retrieval) if retrieval else None
    scores = []
    with Client(url, model=name, retries=RETRIES) as client:
        given = partial(_embedder, client, precision=precision, dimensions=dimensions)
        if pairs:
            with _bar("sentence pairs", 2 * len(pairs.scores)) as bar:
                scores += score_sts(pairs, given(sts_prompt, bar))
        if data:
            with _bar("retrieval", len(data.queries) + len(data.documents)) as bar:
                scores += score_retrieval(
                    data,
                    given(query_prompt, bar),
                    given(document_prompt, bar),
                )
    click.echo(_json(name, scores) if as_json else _table(scores))


def _embedder(
    client: Client,
    prompt: str | None,
    bar: tqdm[Any],
    *,
    precision: Precision,
    dimensions: int | None,
) -> Embed:
    """`client.embed`, in steps that the bar shows; what has few bits, as they say it."""
    ranges = client.info().ranges if precision in ("int8", "uint8") else None

    def embed(texts: Sequence[str]) -> Vectors:
        vectors = []
        for start in range(0, len(texts), _STEP):
            step = texts[start : start + _STEP]
            codes = client.embed(
                step, prompt=prompt, precision=precision, dimensions=dimensions, progress=False
            )
            vectors.append(dequantize(codes, precision, ranges))
            bar.update(len(step))
        return np.concatenate(vectors)

    return embed


def _bar(what: str, texts: int) -> tqdm[Any]:
    # disable=None: on a terminal only
    return tqdm(total=texts, desc=what, unit="text", leave=False, disable=None)


def _json(name: str, scores: Sequence[Score]) -> str:
    rows = [asdict(score) | {"texts_per_s": score.texts_per_s} for score in scores]
    return json.dumps({"model": name, "scores": rows})


def _table(scores: Sequence[Score]) -> str:
    lines = [f"{'measure':<14}{'value':>8}{'texts':>10}{'seconds':>10}{'texts/s':>10}"]
    lines += [
        f"{score.measure:<14}{score.value:>8.2f}{score.texts:>10,}{score.seconds:>10.1f}"
        f"{score.texts_per_s:>10.1f}"
        for score in scores
    ]
    return "\n".join(lines)
