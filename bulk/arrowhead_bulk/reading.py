# SPDX-License-Identifier: Apache-2.0
"""The rows of a unit, some thousand at a time: those that can be embedded, and those that cannot.

Every row is accounted for: it is among the texts of a batch, among its bad rows, or a blank line.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from arrowhead_bulk.corpus import Columns, Corpus, File, Piece, Unit, read_lines, read_rows
from arrowhead_bulk.errors import BadCorpus

BATCH_ROWS = 2048
NULL, NOT_UTF8, NOT_TEXT, UNREADABLE, BAD_ID, TOO_LONG = (
    "null",
    "not UTF-8",
    "not a string",
    "unreadable row",
    "id or kept column",
    "too long",
)
_MOST_TOLD = 200  # characters of what was wrong


class _Bad(NamedTuple):
    """Why a row is none."""

    reason: str
    detail: str


_Row: TypeAlias = "dict[str, Any] | _Bad | None"  # None: a blank line


class BadRow(NamedTuple):
    """A row that is not embedded.

    Attributes:
        file: where it is.
        row: its number in that file, from 0.
        reason: one of a few; they are counted.
        detail: what was met.
    """

    file: str
    row: int
    reason: str
    detail: str


@dataclass
class Batch:
    """Some rows of a unit.

    Attributes:
        texts: of N rows.
        places: file and number within it, of each of them.
        carried: N rows of `Columns.carried`, and `row`: their numbers in the corpus.
        bad: those that are none of the N.
        blank: how many lines hold nothing.
    """

    texts: list[str]
    places: list[tuple[str, int]]
    carried: pa.Table
    bad: list[BadRow] = field(default_factory=list)
    blank: int = 0

    def without(self, rows: Mapping[int, BadRow]) -> Batch:
        """The same, with some of the N rows among the bad ones."""
        if not rows:
            return self
        kept = [row for row in range(len(self.texts)) if row not in rows]
        return Batch(
            [self.texts[row] for row in kept],
            [self.places[row] for row in kept],
            self.carried.take(pa.array(kept, pa.int64())),
            self.bad + list(rows.values()),
            self.blank,
        )


def read(corpus: Corpus, unit: Unit, columns: Columns) -> Iterator[Batch]:
    """The unit's rows, in order.

    Raises:
        BadCorpus: a file is not what it was when the job was planned.
    """
    where = corpus.filesystem
    for piece in unit.pieces:
        file = corpus.files[piece.file]
        try:
            info = where.get_file_info(file.path)
            if (info.size, int(info.mtime_ns or 0)) != (file.size, file.modified_ns):
                raise BadCorpus(
                    f"{file.path} has changed since the job began: put it back, or begin anew with "
                    "--restart"
                )
            rows = _of_parquet if file.format == "parquet" else _of_text
            yield from rows(corpus, piece, columns)
        except (OSError, pa.ArrowException) as error:
            raise BadCorpus(f"{file.path} cannot be read: {error}") from error


def _of_parquet(corpus: Corpus, piece: Piece, columns: Columns) -> Iterator[Batch]:
    file = corpus.files[piece.file]
    with corpus.filesystem.open_input_file(file.path) as source:
        parquet = pq.ParquetFile(source)
        sizes = [parquet.metadata.row_group(group).num_rows for group in range(piece.end)]
        to_skip = piece.first - sum(sizes[: piece.start])
        row, end = piece.first, piece.first + piece.rows
        for rows in parquet.iter_batches(
            BATCH_ROWS,
            row_groups=list(range(piece.start, piece.end)),
            columns=list(dict.fromkeys([columns.text, *columns.carried])),
        ):
            skipped = min(to_skip, rows.num_rows)  # of another unit
            to_skip -= skipped
            own = rows.slice(skipped, end - row)
            if own.num_rows:
                yield _checked_texts(
                    file,
                    range(row, row + own.num_rows),
                    _bytes(own[columns.text]),
                    corpus.carried,
                    [own[one.name] for one in corpus.carried],
                )
                row += own.num_rows
            if row == end:
                return


def _bytes(texts: pa.Array) -> list[bytes | None]:
    """As they are: nobody has proved that they are UTF-8."""
    if pa.types.is_dictionary(texts.type):
        texts = texts.dictionary_decode()
    found: list[bytes | None] = texts.cast(pa.large_binary()).to_pylist()
    return found


def _checked_texts(
    file: File,
    rows: Sequence[int],
    values: Sequence[bytes | None],
    schema: pa.Schema,
    carried: Sequence[pa.Array],
) -> Batch:
    texts, good, bad = list[str](), list[int](), list[BadRow]()
    for place, (row, value) in enumerate(zip(rows, values, strict=True)):
        if value is None:
            bad.append(BadRow(file.path, row, NULL, ""))
            continue
        try:
            texts.append(value.decode())
        except UnicodeDecodeError as error:
            bad.append(
                BadRow(
                    file.path,
                    row,
                    NOT_UTF8,
                    f"byte {error.start} of {len(value)} is 0x{value[error.start]:02x}",
                )
            )
        else:
            good.append(place)
    numbers = pa.array([file.first + row for row in rows], pa.int64())
    table = pa.table([*carried, numbers], schema=schema.append(pa.field("row", pa.int64())))
    return Batch(
        texts,
        [(file.path, rows[place]) for place in good],
        table.take(pa.array(good, pa.int64())) if bad else table,
        bad,
    )


def _of_text(corpus: Corpus, piece: Piece, columns: Columns) -> Iterator[Batch]:
    file = corpus.files[piece.file]
    rows = _json(corpus, file, piece) if file.format == "json" else _csv(corpus, file, piece)
    numbered = enumerate(rows, piece.first)
    while some := list(islice(numbered, BATCH_ROWS)):
        yield _fitting(file, some, columns, corpus.carried)


def _json(corpus: Corpus, file: File, piece: Piece) -> Iterator[_Row]:
    lines = read_lines(corpus.filesystem, file, piece.start, piece.end)
    for line in islice(lines, piece.rows):
        if not line.strip():
            yield None
            continue
        try:
            row = json.loads(line)
        except UnicodeDecodeError as error:
            yield _Bad(NOT_UTF8, str(error))
        except (ValueError, RecursionError) as error:
            yield _Bad(UNREADABLE, str(error))
        else:
            is_row = isinstance(row, dict)
            yield row if is_row else _Bad(UNREADABLE, f"a {type(row).__name__}, wanted an object")


def _csv(corpus: Corpus, file: File, piece: Piece) -> Iterator[_Row]:
    found = read_rows(corpus.filesystem, file, piece.start, piece.end)
    rows = (row for row, _ in found if row != [])
    for row in islice(rows, piece.rows):
        if row is None:
            yield _Bad(UNREADABLE, "no CSV")
        elif len(row) != len(file.names):
            yield _Bad(UNREADABLE, f"{len(row)} columns, wanted {len(file.names)}")
        else:
            yield dict(zip(file.names, row, strict=True))


def _fitting(
    file: File,
    rows: Sequence[tuple[int, _Row]],
    columns: Columns,
    carried: pa.Schema,
) -> Batch:
    """What of these rows can be embedded, with their columns in the types of the corpus."""
    good, bad, blank = list[tuple[int, dict[str, Any]]](), list[BadRow](), 0
    for number, row in rows:
        if row is None:
            blank += 1
        elif isinstance(row, _Bad):
            bad.append(BadRow(file.path, number, row.reason, row.detail[:_MOST_TOLD]))
        elif (value := row.get(columns.text)) is None:
            bad.append(BadRow(file.path, number, NULL, ""))
        elif not isinstance(value, str):
            bad.append(BadRow(file.path, number, NOT_TEXT, f"a {type(value).__name__}"))
        elif (why := _misfit(row, carried)) is not None:
            bad.append(BadRow(file.path, number, BAD_ID, why[:_MOST_TOLD]))
        else:
            good.append((number, row))
    batch = _checked_texts(
        file,
        [number for number, _ in good],
        [_raw(row[columns.text]) for _, row in good],
        carried,
        [pa.array([row.get(one.name) for _, row in good], one.type) for one in carried],
    )
    batch.bad += bad
    batch.blank = blank
    return batch


def _raw(text: str) -> bytes:
    """The bytes that a text was: surrogates stand for those of CSV that were no UTF-8."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # JSON may write others, which have no bytes
        return text.encode("utf-8", "surrogatepass")


def _misfit(row: Mapping[str, Any], carried: pa.Schema) -> str | None:
    """Why a row's columns are not of the corpus' types."""
    for one in carried:
        if (value := row.get(one.name)) is None:
            continue
        try:
            met = pa.array([value]).type  # told the type at once, Arrow would cut 1.5 to 1
            if met != one.type and not (
                pa.types.is_integer(met) and pa.types.is_floating(one.type)
            ):
                return f"{one.name} is {value!r}, wanted {one.type}"
            pa.array([value], one.type)
        except (pa.ArrowException, ValueError, OverflowError) as error:
            return f"{one.name}: {error}"
    return None
