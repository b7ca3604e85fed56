# SPDX-License-Identifier: Apache-2.0
"""The rows of a unit, some thousand at a time: those that can be embedded, and those that cannot.

Every row is accounted for: it is among the texts of a batch, among its bad rows, or a blank line.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain, islice
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from arrowhead_bulk.corpus import Columns, Corpus, Piece, Unit
from arrowhead_bulk.errors import BadCorpus
from arrowhead_bulk.files import MOST_LINE, File, Lines, read_rows

BATCH_ROWS = 2048
BATCH_SIZE = 16_000_000  # characters of texts, and bytes of what goes along
NULL, NOT_UTF8, NOT_TEXT, UNREADABLE, BAD_ID, BAD_COLUMN, TOO_LONG = (
    "null",
    "not UTF-8",
    "not a string",
    "unreadable row",
    "no id, or of another type",
    "kept column of another type",
    "too long",
)
_STEP = 256  # rows that are taken from a file at once: one may have megabytes
_MOST_TOLD = 200  # characters of what was wrong


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


class _Bad(NamedTuple):
    """Why a row is none."""

    reason: str
    detail: str


_Row: TypeAlias = "dict[str, Any] | _Bad | None"  # None: a blank line


@dataclass
class Batch:
    """Some rows of a unit.

    Attributes:
        texts: of N rows.
        places: file and number within it, of each of them.
        numbers: of each, in the corpus.
        carried: N values of each of `Columns.carried`.
        bad: those that are none of the N.
        blank: how many lines hold nothing.
    """

    texts: list[str]
    places: list[tuple[str, int]]
    numbers: list[int]
    carried: list[pa.Array]
    bad: list[BadRow] = field(default_factory=list)
    blank: int = 0

    def __len__(self) -> int:
        """How many rows it accounts for."""
        return len(self.texts) + len(self.bad) + self.blank

    def without(self, rows: Mapping[int, BadRow]) -> Batch:
        """The same, with some of the N rows among the bad ones."""
        if not rows:
            return self
        kept = [row for row in range(len(self.texts)) if row not in rows]
        places = pa.array(kept, pa.int64())
        return Batch(
            [self.texts[row] for row in kept],
            [self.places[row] for row in kept],
            [self.numbers[row] for row in kept],
            [column.take(places) for column in self.carried],
            self.bad + list(rows.values()),
            self.blank,
        )


class Reader:
    """Reads units. One after the other, in one thread at a time.

    What it has open stays so: the next unit of the same row group is read on from there, where a
    new reader would have to pass over the rows before it.

    Args:
        corpus, columns: what is read, and which of it.
    """

    def __init__(self, corpus: Corpus, columns: Columns) -> None:
        self._corpus, self._columns = corpus, columns
        self._where = corpus.filesystem
        self._open: tuple[int, _Stream] | None = None  # and the number of its file

    def __call__(self, unit: Unit) -> Iterator[Batch]:
        """The unit's rows, in order; of small pieces together, of large texts fewer.

        Raises:
            BadCorpus: a file is not what it was when the job was planned.
            OSError: it cannot be read.
        """
        some, size = list[Batch](), 0
        for batch in self._pieces(unit):
            some.append(batch)
            size += sum(map(len, batch.texts)) + sum(one.nbytes for one in batch.carried)
            if size >= BATCH_SIZE or sum(map(len, some)) >= BATCH_ROWS:
                yield _together(some)
                some, size = [], 0
        if some:
            yield _together(some)

    def _pieces(self, unit: Unit) -> Iterator[Batch]:
        for piece in unit.pieces:
            file = self._corpus.files[piece.file]
            info = self._where.get_file_info(file.path)
            if (info.size, int(info.mtime_ns or 0)) != (file.size, file.modified_ns):
                raise BadCorpus(
                    f"{file.path} has changed since the job began: put it back, or begin anew with "
                    "--restart"
                )
            try:
                if file.format == "parquet":
                    yield from self._of_parquet(file, piece)
                else:
                    yield from _of_text(self._corpus, piece, self._columns)
            except pa.ArrowException as error:
                raise BadCorpus(f"{file.path} cannot be read: {error}") from error

    def _of_parquet(self, file: File, piece: Piece) -> Iterator[Batch]:
        columns, first = self._columns, piece.first
        number, stream = self._open or (-1, None)
        self._open = None  # what breaks, or is left in between, is not gone on with
        if stream is None or number != piece.file or not stream.leads_to(piece):
            names = list(dict.fromkeys([columns.text, *columns.carried]))
            stream = _Stream(self._where, file, piece.start, names)
        for rows in stream.take(first, piece.rows):
            kept = [rows[one.name].cast(one.type) for one in self._corpus.carried]
            numbers = range(first, first + rows.num_rows)
            yield _checked(file, numbers, rows[columns.text], kept, columns)
            first += rows.num_rows
        self._open = piece.file, stream


class _Stream:
    """The rows of a Parquet file from one of its row groups on, each of them once."""

    def __init__(self, where: fs.FileSystem, file: File, group: int, names: Sequence[str]) -> None:
        # As a stream: whole columns of a group would be gigabytes.
        source = where.open_input_file(file.path)
        parquet = pq.ParquetFile(source, pre_buffer=False, buffer_size=1 << 20)
        groups = range(parquet.metadata.num_row_groups)
        self._begins: list[int] = [
            0,
            *accumulate(parquet.metadata.row_group(one).num_rows for one in groups),
        ]
        self._row = self._begins[group]  # that comes next
        # Each group for itself: batches would run over its end, which Arrow refuses of some
        # columns, and would depend on where reading began.
        self._batches = chain.from_iterable(
            parquet.iter_batches(_STEP, row_groups=[one], columns=names) for one in groups[group:]
        )
        self._rest: pa.RecordBatch | None = None

    def leads_to(self, piece: Piece) -> bool:
        """Whether the piece is ahead, in the row group that is being read."""
        return self._begins[piece.start] <= self._row <= piece.first

    def take(self, first: int, count: int) -> Iterator[pa.RecordBatch]:
        """So many rows from the `first` of the file on; those before it are passed over."""
        end = first + count
        while self._row < end:
            rows = next(self._batches, None) if self._rest is None else self._rest
            if rows is None:
                return
            skipped = min(max(0, first - self._row), rows.num_rows)
            own = rows.slice(skipped, end - self._row - skipped)
            taken = skipped + own.num_rows
            self._rest = rows.slice(taken) if taken < rows.num_rows else None
            self._row += taken
            if own.num_rows:
                yield own


def _together(some: Sequence[Batch]) -> Batch:
    return Batch(
        [text for one in some for text in one.texts],
        [place for one in some for place in one.places],
        [number for one in some for number in one.numbers],
        [pa.concat_arrays(column) for column in zip(*(one.carried for one in some), strict=True)],
        [row for one in some for row in one.bad],
        sum(one.blank for one in some),
    )


def _checked(
    file: File,
    rows: Sequence[int],
    values: pa.Array,
    carried: Sequence[pa.Array],
    columns: Columns,
) -> Batch:
    """The batch of these rows of a file, those that cannot be embedded among the bad ones.

    Args:
        file: where they are.
        rows: their numbers in it.
        values: their texts, as strings or bytes; nobody has proved that they are UTF-8.
        carried: their columns that go along.
        columns: which these are.
    """
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    raw = values.cast(pa.large_binary())
    bad: dict[int, BadRow] = {}
    try:
        texts = raw.cast(pa.large_string()).to_pylist()
    except pa.ArrowInvalid:
        texts = []
        for place, value in enumerate(raw.to_pylist()):
            try:
                texts.append(None if value is None else value.decode())
            except UnicodeDecodeError as error:
                met = f"byte {error.start} of {len(value)} is 0x{value[error.start]:02x}"
                bad[place] = BadRow(file.path, rows[place], NOT_UTF8, met)
                texts.append("")
    if columns.id:
        for place in np.flatnonzero(carried[0].is_null()):
            bad[int(place)] = BadRow(file.path, rows[place], BAD_ID, "null")
    for place in np.flatnonzero(raw.is_null()):
        bad[int(place)] = BadRow(file.path, rows[place], NULL, "")
    return Batch(
        texts,
        [(file.path, row) for row in rows],
        [file.first + row for row in rows],
        list(carried),
    ).without(dict(sorted(bad.items())))


def _of_text(corpus: Corpus, piece: Piece, columns: Columns) -> Iterator[Batch]:
    file = corpus.files[piece.file]
    rows = _json(corpus, file, piece) if file.format == "json" else _csv(corpus, file, piece)
    numbered = enumerate(rows, piece.first)
    while some := list(islice(numbered, _STEP)):
        yield _fitting(file, some, columns, corpus.carried)


def _json(corpus: Corpus, file: File, piece: Piece) -> Iterator[_Row]:
    lines = Lines(corpus.filesystem, file, piece.start, piece.end)
    for line in islice(lines, piece.rows):
        if not line.strip():
            yield None
            continue
        try:
            row = json.loads(line) if len(line) <= MOST_LINE else None
        except UnicodeDecodeError as error:
            yield _Bad(NOT_UTF8, str(error))
        except (ValueError, RecursionError) as error:
            yield _Bad(UNREADABLE, str(error))
        else:
            is_row = isinstance(row, dict)
            met = type(row).__name__ if len(line) <= MOST_LINE else f"over {MOST_LINE:,} bytes"
            yield row if is_row else _Bad(UNREADABLE, f"{met}, wanted an object")


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
    file: File, rows: Sequence[tuple[int, _Row]], columns: Columns, carried: pa.Schema
) -> Batch:
    """What of these rows can be embedded, with their columns in the types of the corpus."""
    good, kept, bad, blank = list[tuple[int, bytes]](), list[list[Any]](), list[BadRow](), 0
    for number, row in rows:
        if row is None:
            blank += 1
            continue
        values, text = list[Any](), None
        if isinstance(row, _Bad):
            why: _Bad | None = row
        elif (text := row.get(columns.text)) is None:
            why = _Bad(NULL, "")
        elif not isinstance(text, str):
            why = _Bad(NOT_TEXT, f"a {type(text).__name__}")
        else:
            values = [_as(row.get(one.name), one.type) for one in carried]
            why = next((value for value in values if isinstance(value, _Bad)), None)
            if why is not None and isinstance(values[0], _Bad) and columns.id:
                why = _Bad(BAD_ID, why.detail)
        if why is None and isinstance(text, str):
            good.append((number, _raw(text)))
            kept.append(values)
        elif why is not None:
            bad.append(BadRow(file.path, number, why.reason, why.detail[:_MOST_TOLD]))
    batch = _checked(
        file,
        [number for number, _ in good],
        pa.array([text for _, text in good], pa.large_binary()),
        [pa.array([one[n] for one in kept], each.type) for n, each in enumerate(carried)],
        columns,
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


def _as(value: Any, kind: pa.DataType) -> Any:
    """A value of JSON or CSV as one of the column's type; strings hold all there is, as JSON."""
    if value is None:
        return None
    if kind == pa.string():
        told = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        try:
            told.encode()
        except UnicodeEncodeError as error:
            return _Bad(BAD_COLUMN, f"no UTF-8: {error.reason}")
        return told
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if pa.types.is_boolean(kind):
        fits = isinstance(value, bool)
    elif pa.types.is_floating(kind):
        fits = is_number and (isinstance(value, float) or abs(value) <= 2**53)
    else:
        low, high = (0, 2**64) if kind == pa.uint64() else (-(2**63), 2**63)
        fits = is_number and isinstance(value, int) and low <= value < high
    return value if fits else _Bad(BAD_COLUMN, f"{value!r:.80}, wanted {kind}")
