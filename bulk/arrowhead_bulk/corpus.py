# SPDX-License-Identifier: Apache-2.0
"""What is embedded: files of rows, on any filesystem that Arrow knows, cut into units.

    Parquet                    cut between rows; a unit reads the row groups that it has a part of
    JSON lines, CSV, TSV       cut between rows, at bytes that `survey` has found by reading it all
    the same, compressed       cannot be cut: a file is read by one unit

Which rows are a unit depends on the files alone, not on who works on them.
"""

from __future__ import annotations

import csv
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from arrowhead_bulk.errors import BadCorpus

ATOM_ROWS = 4096  # units are made of so many rows, and never of fewer but at the end of a file
MOST_UNITS = 4096
MOST_UNIT_ROWS = 262_144  # 400 MB of float32 vectors of 384 components
FORMATS = {".parquet": "parquet", ".jsonl": "json", ".ndjson": "json", ".csv": "csv", ".tsv": "tsv"}
_COMPRESSED = (".gz", ".bz2", ".zst", ".lz4")
_BLOCK_BYTES = 1 << 20
_SAMPLE_ROWS = 1000  # of JSON lines, that tell the types of columns
_WILD = frozenset("*?[")

csv.field_size_limit(sys.maxsize)  # a text may be long


@dataclass(frozen=True)
class File:
    """One file.

    Attributes:
        path: within its filesystem.
        format: "parquet", "json", "csv" or "tsv".
        is_compressed: whether it can only be read from its beginning.
        size, modified_ns: what it was when the job was planned; a change is noticed by them.
        rows: how many it has; lines, of JSON.
        first: the number of its first row in the corpus.
        names: of the columns, where the file's first line tells them.
    """

    path: str
    format: str
    is_compressed: bool
    size: int
    modified_ns: int
    rows: int = 0
    first: int = 0
    names: tuple[str, ...] = ()


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


def filesystem(uri: str) -> tuple[fs.FileSystem, str]:
    """The filesystem of a URI or a path of this machine, and the path within it.

    Raises:
        BadCorpus: Arrow knows no such filesystem.
    """
    if "://" not in uri:
        return fs.LocalFileSystem(), str(Path(uri).absolute()) if uri else ""
    try:
        found: tuple[fs.FileSystem, str] = fs.FileSystem.from_uri(uri)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise BadCorpus(f"{uri}: {error}") from error
    return found


def survey(sources: Sequence[str], columns: Columns) -> Corpus:
    """Finds the files, looks at them, and cuts them.

    Args:
        sources: files, folders, or patterns such as `corpus/*.parquet`; paths or URIs.
        columns: what is to be read.

    Raises:
        BadCorpus: nothing is there, it cannot be read, or a column is missing; says where.
    """
    files, root = _found(sources)
    where, _ = filesystem(root)
    surveyed: list[File] = []
    atoms: list[Piece] = []
    carried: pa.Schema | None = None
    for number, file in enumerate(files):
        try:
            names, schema, pieces = _surveyed(where, file, number, columns)
        except (OSError, pa.ArrowException, ValueError) as error:
            raise BadCorpus(f"{file.path} cannot be read as {file.format}: {error}") from error
        if carried is None or not len(carried):
            carried = schema
        elif len(schema) and schema != carried:
            raise BadCorpus(
                f"{file.path} has {_told(schema)}, where {surveyed[0].path} has {_told(carried)}: "
                "wanted the same types in all files"
            )
        first = surveyed[-1].first + surveyed[-1].rows if surveyed else 0
        rows = sum(piece.rows for piece in pieces)
        surveyed.append(File(**{**vars(file), "rows": rows, "first": first, "names": tuple(names)}))
        atoms += pieces
    rows = sum(file.rows for file in surveyed)
    if not rows:
        raise BadCorpus(f"{', '.join(sources)}: no rows")
    target = min(max(ATOM_ROWS, -(-rows // MOST_UNITS)), MOST_UNIT_ROWS)
    return Corpus(root, tuple(surveyed), carried or pa.schema([]), tuple(_units(atoms, target)))


def read_rows(
    where: fs.FileSystem, file: File, start: int, end: int
) -> Iterator[tuple[list[str] | None, int]]:
    """The rows of a CSV or TSV file between two bytes, and after each the byte where it ends.

    A row is None where it cannot be read at all. Bytes that are no UTF-8 come as surrogates.
    """
    lines = _Lines(where, file, start, end)
    rows = (
        csv.reader(lines.decoded(), delimiter="\t", quoting=csv.QUOTE_NONE)
        if file.format == "tsv"
        else csv.reader(lines.decoded())
    )
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error:
            yield None, lines.consumed
        else:
            yield row, lines.consumed


def read_lines(where: fs.FileSystem, file: File, start: int, end: int) -> Iterator[bytes]:
    """The lines of a file between two bytes, without their ends."""
    return (line.rstrip(b"\r\n") for line in _Lines(where, file, start, end))


class _Lines:
    """Lines of a file between two bytes (`end` -1: to its end).

    Attributes:
        consumed: the byte behind the last line that was given.
    """

    def __init__(self, where: fs.FileSystem, file: File, start: int, end: int) -> None:
        self.consumed = start
        self._where, self._file, self._end = where, file, end

    def __iter__(self) -> Iterator[bytes]:
        with _opened(self._where, self._file, self.consumed) as stream:
            left = b""
            while block := stream.read(_BLOCK_BYTES):
                lines = (left + block).split(b"\n")
                left = lines.pop()
                for line in lines:
                    if 0 <= self._end <= self.consumed:
                        return
                    self.consumed += len(line) + 1
                    yield line + b"\n"
            if left and not 0 <= self._end <= self.consumed:
                self.consumed += len(left)
                yield left

    def decoded(self) -> Iterator[str]:
        """As text; a mark at the beginning of a file is none of it."""
        is_first = self.consumed == 0
        for line in self:
            text = line.decode("utf-8", "surrogateescape")
            yield text.removeprefix("\ufeff") if is_first else text
            is_first = False


def _opened(where: fs.FileSystem, file: File, start: int) -> Any:
    if file.is_compressed:
        stream = where.open_input_stream(file.path, compression="detect")
        stream.read(start)  # the names of columns, at most
        return stream
    stream = where.open_input_file(file.path)
    stream.seek(start)
    return stream


def _found(sources: Sequence[str]) -> tuple[list[File], str]:
    """The files, and a URI of their filesystem."""
    roots, files = set(), dict[str, File]()
    for source in sources:
        where, path = filesystem(source)
        scheme, there, rest = source.partition("://")
        roots.add(f"{scheme}://{rest.partition('/')[0]}" + _query(rest) if there else "")
        found = [info for info in _infos(where, path) if _format(info.path) or info.path == path]
        if not found:
            raise BadCorpus(
                f"{source}: nothing there of {', '.join(FORMATS)} (or compressed: "
                f"{', '.join(_COMPRESSED)})"
            )
        for info in found:
            form = _format(info.path)
            if not form:
                raise BadCorpus(f"{info.path}: wanted a name that ends in {', '.join(FORMATS)}")
            files[info.path] = File(
                info.path,
                form,
                info.path.endswith(_COMPRESSED),
                info.size,
                int(info.mtime_ns or 0),
            )
    if len(roots) > 1:
        raise BadCorpus(f"files of {len(roots)} filesystems ({', '.join(sorted(roots))}): give one")
    return [files[path] for path in sorted(files)], roots.pop()


def _query(rest: str) -> str:
    """What a URI says of how to reach its filesystem, such as `?endpoint_override=...`."""
    query = rest.partition("?")[2]
    return f"?{query}" if query else ""


def _infos(where: fs.FileSystem, path: str) -> Iterator[fs.FileInfo]:
    """Of a file, of all below a folder, or of all that fit a pattern; nothing that is hidden."""
    base = path
    while _WILD & set(base):
        base = base.rpartition("/")[0]
    try:
        info = where.get_file_info(base)
        if info.type == fs.FileType.File:
            yield info
        elif info.type == fs.FileType.Directory:
            for one in where.get_file_info(fs.FileSelector(base, recursive=True)):
                inside = one.path.removeprefix(base).strip("/")
                is_hidden = any(part.startswith((".", "_")) for part in inside.split("/"))
                fits = base == path or PurePosixPath(one.path).match(path)
                if one.type == fs.FileType.File and not is_hidden and fits:
                    yield one
    except OSError as error:
        raise BadCorpus(f"{path}: {error}") from error


def _format(path: str) -> str:
    name = path.lower()
    for ending in _COMPRESSED:
        name = name.removesuffix(ending)
    if name != path.lower() and name.endswith(".parquet"):
        return ""
    return next((form for ending, form in FORMATS.items() if name.endswith(ending)), "")


def _surveyed(
    where: fs.FileSystem, file: File, number: int, columns: Columns
) -> tuple[Sequence[str], pa.Schema, list[Piece]]:
    """The names of a file's columns if its first line tells them, the carried types, the atoms."""
    if file.format == "parquet":
        with where.open_input_file(file.path) as source:
            parquet = pq.ParquetFile(source)
            schema = parquet.schema_arrow
            _check(file, schema.names, columns)
            kind = schema.field(columns.text).type
            kind = kind.value_type if pa.types.is_dictionary(kind) else kind
            if not (_is_text(kind) or pa.types.is_null(kind)):
                raise BadCorpus(f"{file.path}: column {columns.text!r} is {kind}: wanted strings")
            groups = [
                parquet.metadata.row_group(group).num_rows
                for group in range(parquet.metadata.num_row_groups)
            ]
            carried = pa.schema([(name, schema.field(name).type) for name in columns.carried])
            return (), carried, list(_atoms_of_groups(number, groups))
    if file.format == "json":
        carried = _sampled(where, file, columns)
        return (), carried, _whole(file, list(_atoms_of_lines(where, file, number)))
    head = next(read_rows(where, file, 0, -1), None)
    if head is None:
        return (), pa.schema([]), []
    names, begin = head[0] or [], head[1]
    _check(file, names, columns)
    carried = pa.schema([(name, pa.string()) for name in columns.carried])
    return names, carried, _whole(file, list(_atoms_of_rows(where, file, number, begin)))


def _is_text(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_string_view(kind)
        or pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
    )


def _check(file: File, names: Sequence[str], columns: Columns) -> None:
    for name in (columns.text, *columns.carried):
        if name not in names:
            raise BadCorpus(
                f"{file.path}: no column {name!r} among {', '.join(map(repr, names))}: choose with "
                "--column, --id and --keep"
            )


def _sampled(where: fs.FileSystem, file: File, columns: Columns) -> pa.Schema:
    """The types of columns in JSON lines, as the first lines have them."""
    kinds: dict[str, Counter[pa.DataType]] = {name: Counter() for name in columns.carried}
    seen: set[str] = set()
    for number, line in enumerate(read_lines(where, file, 0, -1)):
        if number == _SAMPLE_ROWS:
            break
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            seen |= row.keys()
            for name, kind in kinds.items():
                if row.get(name) is not None:
                    kind[_kind(row[name])] += 1
    if not seen:
        return pa.schema([])
    _check(file, sorted(seen), columns)
    return pa.schema([(name, _usual(kind)) for name, kind in kinds.items()])


def _kind(value: Any) -> pa.DataType:
    try:
        return pa.array([value]).type
    except (pa.ArrowException, OverflowError):
        return pa.null()


def _usual(kinds: Counter[pa.DataType]) -> pa.DataType:
    """The type that most values have; rows of another are bad ones."""
    if {pa.int64(), pa.float64()} == kinds.keys():
        return pa.float64()
    return next((kind for kind, _ in kinds.most_common() if kind != pa.null()), pa.string())


def _atoms_of_groups(file: int, groups: Iterable[int]) -> Iterator[Piece]:
    first = 0
    for group, rows in enumerate(groups):
        for start in range(0, rows, ATOM_ROWS):
            yield Piece(file, first + start, min(ATOM_ROWS, rows - start), group, group + 1)
        first += rows


def _atoms_of_lines(where: fs.FileSystem, file: File, number: int) -> Iterator[Piece]:
    first = start = offset = lines = 0
    last = b"\n"
    with _opened(where, file, 0) as stream:
        while block := stream.read(_BLOCK_BYTES):
            ends = np.flatnonzero(np.frombuffer(block, np.uint8) == 10) + 1
            while lines + len(ends) >= ATOM_ROWS:
                taken = ATOM_ROWS - lines
                end = offset + int(ends[taken - 1])
                yield Piece(number, first, ATOM_ROWS, start, end)
                first, start, lines, ends = first + ATOM_ROWS, end, 0, ends[taken:]
            lines += len(ends)
            offset, last = offset + len(block), block[-1:]
    lines += last != b"\n"
    if lines:
        yield Piece(number, first, lines, start, offset)


def _atoms_of_rows(where: fs.FileSystem, file: File, number: int, begin: int) -> Iterator[Piece]:
    first = rows = 0
    start = end = begin
    for row, end in read_rows(where, file, begin, -1):
        rows += row != []  # a blank line is none
        if rows == ATOM_ROWS:
            yield Piece(number, first, rows, start, end)
            first, rows, start = first + rows, 0, end
    if rows:
        yield Piece(number, first, rows, start, end)


def _whole(file: File, atoms: list[Piece]) -> list[Piece]:
    """In one, of a file that cannot be cut."""
    return [_joined(atoms[0], atoms[-1])] if file.is_compressed and atoms else atoms


def _joined(first: Piece, last: Piece) -> Piece:
    rows = last.first + last.rows - first.first
    return first._replace(rows=rows, end=last.end)


def _units(atoms: Iterable[Piece], target: int) -> Iterator[Unit]:
    """Neighbours together, until there are enough rows."""
    number, rows, pieces = 0, 0, list[Piece]()
    for atom in atoms:
        if pieces and rows + atom.rows > target:
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
    return ", ".join(f"{field.name} {field.type}" for field in schema)
