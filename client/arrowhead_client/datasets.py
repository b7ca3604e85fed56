# SPDX-License-Identifier: Apache-2.0
"""What a model is scored on: sentence pairs that people compared, and a corpus with judgements.

Read from files as they are published. A file that is not as told is `InvalidInput`, with its line.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arrowhead_client._algebra import Vectors
from arrowhead_client._errors import InvalidInput
from arrowhead_client.measures import cosines, spearman

if TYPE_CHECKING:
    import pyarrow as pa

_ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class StsPairs:
    """Sentence pairs and how alike people found them.

    Attributes:
        left: N sentences.
        right: N sentences, to be compared with those of `left`.
        scores: N numbers; the higher, the more alike.
    """

    left: list[str]
    right: list[str]
    scores: list[float]

    @classmethod
    def read(cls, file: Path) -> StsPairs:
        """Reads a CSV of `sentence1,sentence2,score`, with or without that line on top.

        Raises:
            InvalidInput: no such file, a line of other than three fields, or a score that is no
                number; says which line.
        """
        left, right, scores = [], [], []
        for place, row in _csv_rows(file, ","):
            if len(row) != 3:
                raise InvalidInput(
                    f"{place}: {len(row)} fields; wanted lines of sentence1,sentence2,score"
                )
            left.append(row[0])
            right.append(row[1])
            scores.append(_number(row[2], place))
        if not scores:
            raise InvalidInput(f"{file}: no pairs; wanted lines of sentence1,sentence2,score")
        return cls(left, right, scores)

    def percent(self, left: Vectors, right: Vectors) -> float:
        """Spearman x 100 of the cosines of the sentences' vectors, `[N, D]` each, with the scores.

        Raises:
            InvalidInput: all scores, or all cosines, are equal.
        """
        return 100 * spearman(cosines(left, right), self.scores)


@dataclass(frozen=True)
class RetrievalSet:
    """A corpus, the queries that were judged, and the judgements.

    Attributes:
        documents: M texts: title and text of each document.
        queries: N texts, those of the queries that have judgements.
        judged: for each query, how relevant (0: not at all) the judged documents are, by index.
        own: for each query, the index of the document with the query's own id, or None. It is no
            hit, as in BEIR: there the queries of some sets are documents of their corpus.
    """

    documents: list[str]
    queries: list[str]
    judged: list[dict[int, float]]
    own: list[int | None]

    @classmethod
    def read(cls, folder: Path) -> RetrievalSet:
        """Reads a folder in BEIR's layout, or one of Parquet files.

        Corpus (`_id`, `title`, `text`): `corpus.jsonl`, or one `*.corpus.parquet`.
        Queries (`_id`, `text`): `queries.jsonl`, or one `*.queries.parquet`.
        Judgements (`query-id`, `corpus-id`, `score` and a line saying so, tabs between them):
        `qrels/test.tsv`, or one `*.qrels.test.tsv`.

        Raises:
            InvalidInput: a part is missing or cannot be read, an id is there twice, or a judgement
                is of a query or a document that is not there; names the file and the line.
        """
        corpus, documents = _texts(_part(folder, "corpus.jsonl", "*.corpus.parquet"))
        found, texts = _texts(_part(folder, "queries.jsonl", "*.queries.parquet"))
        file = _part(folder, "qrels/test.tsv", "*.qrels.test.tsv")
        judged: dict[str, dict[int, float]] = {}
        for place, row in _csv_rows(file, "\t"):
            if len(row) != 3:
                raise InvalidInput(
                    f"{place}: {len(row)} fields; wanted query-id, corpus-id, score, tabs between"
                )
            query, document, score = row
            for kind, known, name in (("query", found, query), ("document", corpus, document)):
                if name not in known:
                    raise InvalidInput(f"{place}: {kind} {name!r} is not in {folder}")
            judged.setdefault(query, {})[corpus[document]] = _number(score, place)
        if not judged:
            raise InvalidInput(f"{file}: no judgements; wanted query-id, corpus-id, score")
        return cls(
            documents,
            [texts[found[query]] for query in judged],
            list(judged.values()),
            [corpus.get(query) for query in judged],
        )


def _part(folder: Path, name: str, pattern: str) -> Path:
    """The one file of a set that is called so."""
    if (folder / name).is_file():
        return folder / name
    files = sorted(folder.glob(pattern))
    if len(files) != 1:
        met = ", ".join(file.name for file in files) or "neither"
        raise InvalidInput(f"{folder}: wanted {name} or one {pattern}, met {met}")
    return files[0]


def _texts(file: Path) -> tuple[dict[str, int], list[str]]:
    """Of a corpus or of queries: each id's index, and the texts, a title in front."""
    index: dict[str, int] = {}
    texts: list[str] = []
    for place, row in parquet_rows(file) if file.suffix == ".parquet" else json_rows(file):
        name, title, text = row.get("_id"), row.get("title") or "", row.get("text")
        if not (isinstance(name, (str, int)) and isinstance(title, str) and isinstance(text, str)):
            raise InvalidInput(
                f"{place}: _id, title and text are {name!r:.40}, {title!r:.40} and {text!r:.40}; "
                "wanted strings (a title may be missing)"
            )
        if index.setdefault(str(name), len(texts)) != len(texts):
            raise InvalidInput(f"{place}: _id {name!r} is there twice")
        texts.append(f"{title} {text}".strip())
    return index, texts


def parquet_rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a Parquet file, each with its place; a few thousand are held at once.

    Raises:
        InvalidInput: it cannot be read.
    """
    import pyarrow as pa  # heavy, and the other commands do without it
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as table:
            number = 0
            for batch in table.iter_batches(_ROWS_AT_ONCE):
                for row in in_microseconds(batch).to_pylist():
                    number += 1
                    yield f"{file}, row {number}", row
    except (OSError, ValueError, pa.ArrowException) as error:
        raise InvalidInput(f"{file} is no Parquet file that can be read: {error}") from error


def in_microseconds(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The same, its timestamps cut to what a `datetime` holds."""
    import pyarrow as pa

    kinds = [
        pa.timestamp("us", kind.tz) if pa.types.is_timestamp(kind) and kind.unit == "ns" else kind
        for kind in batch.schema.types
    ]
    columns = [
        one.cast(kind, safe=False) if one.type != kind else one
        for one, kind in zip(batch.columns, kinds, strict=True)
    ]
    return pa.RecordBatch.from_arrays(columns, names=batch.schema.names)


def json_rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a file of JSON lines, each with its place; empty lines are left out.

    Raises:
        InvalidInput: it cannot be read, or a line is no object.
    """
    for number, line in enumerate(_lines(file), 1):
        if line.strip():
            place = f"{file}, line {number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise InvalidInput(f"{place} is no JSON: {error}") from error
            if not isinstance(row, dict):
                raise InvalidInput(f"{place}: {type(row).__name__}; wanted an object")
            yield place, row


def _csv_rows(file: Path, separator: str) -> Iterator[tuple[str, list[str]]]:
    """The rows, without empty ones and without a line of names on top."""
    # Ids between tabs have no quotes; a sentence may have them, and line ends inside.
    quotes = None if separator == "\t" else '"'
    rows = csv.reader(_lines(file), delimiter=separator, quotechar=quotes)
    try:
        for number, row in enumerate(rows):
            if row and not (number == 0 and row[-1].strip().lower() == "score"):
                yield f"{file}, line {rows.line_num}", row
    except csv.Error as error:
        raise InvalidInput(f"{file}, line {rows.line_num}: {error}") from error


def _lines(file: Path) -> Iterator[str]:
    number = 1
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            for line in lines:
                yield line
                number += 1
    except UnicodeDecodeError as error:  # its position is of a piece of the file, and says nothing
        raise InvalidInput(f"{file} is not UTF-8, in line {number} or soon after") from error
    except OSError as error:
        raise InvalidInput(f"cannot read {file}: {error.strerror or error}") from error


def _number(text: str, place: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise InvalidInput(f"{place}: the score is {text!r}; wanted a number")
    return number
