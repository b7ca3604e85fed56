# SPDX-License-Identifier: Apache-2.0
"""What is embedded: files of rows, cut into units.

    Parquet                    cut between rows; a unit reads the row groups that it has a part of
    JSON lines, CSV, TSV       cut between rows, at bytes that `survey` has found by reading it all
    the same, compressed       cannot be cut: a file is read by one unit

Which rows are a unit depends on the files alone, not on who works on them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs
from tqdm import tqdm

from arrowhead_bulk.errors import BadCorpus
from arrowhead_bulk.files import File, Lines, filesystem, find, opened, read_rows

ATOM_ROWS = 4096  # of a unit at least; only the last one has fewer
MOST_UNITS = 4096  # until they would have more rows than that:
MOST_UNIT_ROWS = 65_536  # 100 MB of float32 vectors of 384 components
_CUTS_OF_A_GROUP = 16  # at most: each reads its row group from the beginning
_BLOCK_BYTES = 1 << 20
_SAMPLE_ROWS = 1000  # of JSON lines, that tell the types of columns
_LOOKS_AT_ONCE = 16


class Piece(NamedTuple):
    """Neighbouring rows of one file.

    Attributes:
        file: its number in the corpus.
        first, rows: the first of them in the file, and how many there are.
        start, end: where they are: row groups of a Parquet file, else bytes.
    """

    file: int
    first: int
    rows: int
    start: int
    end: int


class Unit(NamedTuple):
    """What becomes one file, and is done again as a whole if it must be."""

    number: int
    pieces: tuple[Piece, ...]

    @property
    def rows(self) -> int:
        """How many it has."""
        return sum(piece.rows for piece in self.pieces)


class Columns(NamedTuple):
    """Which columns are read.

    Attributes:
        text: is embedded.
        id: names the row in the output; None: its number in the corpus does.
        keep: go into the output as they are.
    """

    text: str
    id: str | None = None
    keep: tuple[str, ...] = ()

    @property
    def carried(self) -> tuple[str, ...]:
        """Those that are read beside the text and go into the output."""
        return tuple(dict.fromkeys([*([self.id] if self.id else []), *self.keep]))


@dataclass(frozen=True)
class Corpus:
    """All rows, and their cut.

    Attributes:
        root: a URI whose filesystem all files are on, or "" for this machine's.
        files: in the order of their names.
        carried: the types of `Columns.carried`.
        units: all of them.
    """

    root: str
    files: tuple[File, ...]
    carried: pa.Schema
    units: tuple[Unit, ...]

    @property
    def rows(self) -> int:
        """How many there are."""
        return sum(file.rows for file in self.files)

    @property
    def filesystem(self) -> fs.FileSystem:
        """Where the files are."""
        return filesystem(self.root)[0]


@dataclass
class _Look:
    """What one file was found to be.

    Attributes:
        names: of its columns, where the first line tells them.
        carried: their types, where they are told.
        kinds: of the first values, where they are not: by column, how often there is which.
        atoms: its cut; `file` of these is not set.
    """

    names: tuple[str, ...]
    carried: pa.Schema | None
    kinds: dict[str, Counter[pa.DataType]]
    atoms: list[Piece]


def survey(sources: Sequence[str], columns: Columns) -> Corpus:
    """Finds the files, looks at them, and cuts them.

    Args:
        sources: files, folders, or patterns such as `corpus/*.parquet`; paths or URIs.
        columns: what is to be read.

    Raises:
        BadCorpus: nothing is there, it cannot be read, or a column is missing; says where.
    """
    files, root = find(sources)
    where, _ = filesystem(root)

    def look(file: File) -> _Look:
        try:
            return _look(where, file, columns)
        except (OSError, pa.ArrowException, ValueError, LookupError) as error:
            raise BadCorpus(f"{file.path} cannot be read as {file.format}: {error}") from error

    with ThreadPoolExecutor(_LOOKS_AT_ONCE) as threads:
        looks = list(
            tqdm(threads.map(look, files), "look at files", len(files), unit="file", disable=None)
        )
    surveyed, first = list[File](), 0
    for file, found in zip(files, looks, strict=True):
        rows = sum(piece.rows for piece in found.atoms)
        surveyed.append(replace(file, rows=rows, first=first, names=found.names))
        first += rows
    if not first:
        raise BadCorpus(f"{', '.join(sources)}: no rows")
    atoms = (
        atom._replace(file=number) for number, found in enumerate(looks) for atom in found.atoms
    )
    target = min(max(ATOM_ROWS, -(-first // MOST_UNITS)), MOST_UNIT_ROWS)
    carried = _carried(surveyed, looks, columns)
    return Corpus(root, tuple(surveyed), carried, tuple(_units(atoms, target)))


def _carried(files: Sequence[File], looks: Sequence[_Look], columns: Columns) -> pa.Schema:
    """The types of columns, which all files must share."""
    first: tuple[File, pa.Schema] | None = None
    kinds: dict[str, Counter[pa.DataType]] = {}
    for file, found in zip(files, looks, strict=True):
        for name, kind in found.kinds.items():
            kinds.setdefault(name, Counter()).update(kind)
        if found.carried is None or not file.rows:
            continue
        if first is None:
            first = file, found.carried
        elif found.carried != first[1]:
            raise BadCorpus(
                f"{file.path} has {_told(found.carried)}, where {first[0].path} has "
                f"{_told(first[1])}: wanted the same types in all files"
            )
    if not kinds:
        if first is None and columns.carried:
            raise BadCorpus(
                f"{files[0].path}: none of the first {_SAMPLE_ROWS:,} lines is a JSON object, so "
                "nothing tells the types of columns: mend them, or leave out --id and --keep"
            )
        return first[1] if first else pa.schema([])
    sampled = next(file for file in files if file.format == "json")
    _check(sampled, sorted(kinds), columns)
    found_schema = pa.schema([(name, _usual(kinds[name])) for name in columns.carried])
    if first is not None and first[1] != found_schema:
        raise BadCorpus(
            f"JSON lines have {_told(found_schema)}, where {first[0].path} has {_told(first[1])}: "
            "wanted the same types in all files"
        )
    return found_schema


def _look(where: fs.FileSystem, file: File, columns: Columns) -> _Look:
    if file.format == "parquet":
        return _look_at_parquet(where, file, columns)
    if file.format == "json":
        kinds = _sampled(where, file)
        return _Look((), None, kinds, _whole(file, list(_atoms_of_lines(where, file))))
    head = next(read_rows(where, file, 0, -1), None)
    if head is None:
        return _Look((), None, {}, [])
    names = tuple(head[0] or ())
    _check(file, names, columns)
    carried = pa.schema([(name, pa.string()) for name in columns.carried])
    return _Look(names, carried, {}, _whole(file, list(_atoms_of_rows(where, file, head[1]))))


def _look_at_parquet(where: fs.FileSystem, file: File, columns: Columns) -> _Look:
    with where.open_input_file(file.path) as source:
        parquet = pq.ParquetFile(source)
        schema, metadata = parquet.schema_arrow, parquet.metadata
        groups = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    _check(file, schema.names, columns)
    kind = schema.field(columns.text).type
    if not is_text(kind):
        raise BadCorpus(f"{file.path}: column {columns.text!r} is {kind}: wanted strings")
    carried = pa.schema([(name, _kept(schema.field(name).type)) for name in columns.carried])
    return _Look((), carried, {}, list(_atoms_of_groups(groups)))


def is_text(kind: pa.DataType) -> bool:
    """Whether a column of that type holds strings, or bytes that may be some."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    kinds = (pa.string(), pa.large_string(), pa.string_view())
    return kind in (*kinds, pa.binary(), pa.large_binary(), pa.binary_view(), pa.null())


def _kept(kind: pa.DataType) -> pa.DataType:
    """The type in which a column is kept: Arrow cannot take rows of a view."""
    views = {pa.string_view(): pa.string(), pa.binary_view(): pa.binary()}
    return views.get(kind, kind)


def _check(file: File, names: Sequence[str], columns: Columns) -> None:
    for name in (columns.text, *columns.carried):
        if name not in names:
            raise BadCorpus(
                f"{file.path}: no column {name!r} among {', '.join(map(repr, names))}: choose with "
                "--column, --id and --keep"
            )
        if names.count(name) > 1:
            raise BadCorpus(f"{file.path}: {names.count(name)} columns are called {name!r}")


def _sampled(where: fs.FileSystem, file: File) -> dict[str, Counter[pa.DataType]]:
    """The types of all columns in JSON lines, as the first lines have them."""
    kinds: dict[str, Counter[pa.DataType]] = {}
    for number, line in enumerate(Lines(where, file, 0, -1)):
        if number == _SAMPLE_ROWS:
            break
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            for name, value in row.items():
                kind = kinds.setdefault(name, Counter())
                if value is not None:
                    kind[_kind(value)] += 1
    return kinds


def _kind(value: Any) -> pa.DataType:
    if isinstance(value, bool):
        return pa.bool_()
    if isinstance(value, int):
        return pa.int64() if -(2**63) <= value < 2**63 else pa.uint64()
    return pa.float64() if isinstance(value, float) else pa.string()


def _usual(kinds: Counter[pa.DataType]) -> pa.DataType:
    """The type for values of these: strings hold whatever there is, as JSON."""
    for some, kind in (
        ({pa.bool_()}, pa.bool_()),
        ({pa.int64()}, pa.int64()),
        ({pa.int64(), pa.uint64()}, pa.uint64()),
        ({pa.int64(), pa.float64()}, pa.float64()),
    ):
        if kinds and kinds.keys() <= some:
            return kind
    # A row of another type than most is a bad one.
    usual = kinds.most_common(1)
    return usual[0][0] if usual and 10 * usual[0][1] > 9 * kinds.total() else pa.string()


def _atoms_of_groups(groups: Iterable[int]) -> Iterator[Piece]:
    first = 0
    for group, rows in enumerate(groups):
        step = min(max(ATOM_ROWS, -(-rows // _CUTS_OF_A_GROUP)), MOST_UNIT_ROWS)
        for start in range(0, rows, step):
            yield Piece(0, first + start, min(step, rows - start), group, group + 1)
        first += rows


def _atoms_of_lines(where: fs.FileSystem, file: File) -> Iterator[Piece]:
    first = start = offset = lines = 0
    last = b"\n"
    with opened(where, file) as stream:
        while block := stream.read(_BLOCK_BYTES):
            ends = np.flatnonzero(np.frombuffer(block, np.uint8) == 10) + 1
            while lines + len(ends) >= ATOM_ROWS:
                taken = ATOM_ROWS - lines
                end = offset + int(ends[taken - 1])
                yield Piece(0, first, ATOM_ROWS, start, end)
                first, start, lines, ends = first + ATOM_ROWS, end, 0, ends[taken:]
            lines += len(ends)
            offset, last = offset + len(block), block[-1:]
    lines += last != b"\n"
    if lines:
        yield Piece(0, first, lines, start, offset)


def _atoms_of_rows(where: fs.FileSystem, file: File, begin: int) -> Iterator[Piece]:
    first = rows = 0
    start = end = begin
    for row, end in read_rows(where, file, begin, -1):
        rows += row != []  # a blank line is none
        if rows == ATOM_ROWS:
            yield Piece(0, first, rows, start, end)
            first, rows, start = first + rows, 0, end
    if rows:
        yield Piece(0, first, rows, start, end)


def _whole(file: File, atoms: list[Piece]) -> list[Piece]:
    """In one, of a file that cannot be cut."""
    return [_joined(atoms[0], atoms[-1])] if file.codec and atoms else atoms


def _joined(first: Piece, last: Piece) -> Piece:
    rows = last.first + last.rows - first.first
    return first._replace(rows=rows, end=last.end)


def _units(atoms: Iterable[Piece], target: int) -> Iterator[Unit]:
    """Neighbours together, until there are enough rows."""
    number, rows, pieces = 0, 0, list[Piece]()
    for atom in atoms:
        if rows >= target:
            yield Unit(number, tuple(pieces))
            number, rows, pieces = number + 1, 0, []
        if pieces and pieces[-1].file == atom.file:
            pieces[-1] = _joined(pieces[-1], atom)
        else:
            pieces.append(atom)
        rows += atom.rows
    if pieces:
        yield Unit(number, tuple(pieces))


def _told(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} {field.type}" for field in schema) or "no columns to keep"
