# SPDX-License-Identifier: Apache-2.0
"""The output: a Parquet file for each unit, there whole or not at all, that says what it is.

    part-00012.parquet         id, the kept columns, embedding, tokens, truncated
    _bad/part-00012.parquet    file, row, reason, detail: the unit's rows that were not embedded

The part is written last: where it is, the unit is done. A key in its metadata names the space of
its vectors and the job; each page has a checksum.
"""

from __future__ import annotations

import json
import os
import secrets
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import fs

from arrowhead_bulk.corpus import Unit
from arrowhead_bulk.errors import Incomplete
from arrowhead_bulk.files import filesystem
from arrowhead_bulk.reading import BadRow
from arrowhead_client import _bulk_format
from arrowhead_client._bulk_format import EMBEDDING, METADATA, TOKENS, TRUNCATED

UNIT = b"arrowhead.unit"  # of a file's schema: `Done`
ID = "id"
OWN = (ID, EMBEDDING, TOKENS, TRUNCATED)
BAD = "_bad"
GROUP_ROWS = 16_384
_BAD_ROWS = pa.schema(
    [("file", pa.string()), ("row", pa.int64()), ("reason", pa.string()), ("detail", pa.string())]
)
_TORN = (OSError, pa.ArrowException, ValueError, KeyError, TypeError)


@dataclass
class Done:
    """What came of a unit.

    Attributes:
        number: the unit's.
        rows: that have a vector.
        bad: those that have none, by reason. blank: lines without anything.
        tokens: that the model read of them. truncated: texts of which it did not read all.
        was_there: whether another run had done it.
    """

    number: int
    rows: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    blank: int = 0
    tokens: int = 0
    truncated: int = 0
    was_there: bool = False

    @property
    def seen(self) -> int:
        """Rows of the unit, whatever became of them."""
        return self.rows + self.bad.total() + self.blank

    def to_json(self) -> str:
        """As it travels, and as a part keeps it."""
        return json.dumps(vars(self))

    @classmethod
    def from_json(cls, raw: str | bytes) -> Done:
        """Inverse of `to_json`."""
        told = json.loads(raw)
        return cls(**{**told, "bad": Counter(told["bad"])})


class Folder:
    """Where parts are, on any filesystem.

    Attributes:
        uri: as it was given.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.filesystem, self.path = filesystem(uri)
        self.path = self.path.rstrip("/")

    @property
    def is_local(self) -> bool:
        """Whether a file can be put in its place at one moment by being renamed."""
        return isinstance(self.filesystem, fs.LocalFileSystem)

    def file(self, name: str) -> str:
        """The path of a file in it."""
        return f"{self.path}/{name}"

    def names(self) -> list[str]:
        """Of all files below it but those that are being written; empty if it is not there."""
        found = self.filesystem.get_file_info(
            fs.FileSelector(self.path, allow_not_found=True, recursive=True)
        )
        files = (info.path for info in found if info.type == fs.FileType.File)
        names = sorted(path.removeprefix(f"{self.path}/") for path in files)
        return [name for name in names if not name.rpartition("/")[2].startswith(".")]

    def tidy(self) -> None:
        """Removes what was being written by those that died over it."""
        for name in ("", f"/{BAD}"):
            for info in self.filesystem.get_file_info(
                fs.FileSelector(self.path + name, allow_not_found=True)
            ):
                if info.base_name.startswith(".") and info.type == fs.FileType.File:
                    self.filesystem.delete_file(info.path)

    def make(self) -> None:
        """Makes it, and what is below it."""
        self.filesystem.create_dir(self.file(BAD), recursive=True)

    def read(self, name: str) -> bytes | None:
        """What a file holds; None if it is not there."""
        path = self.file(name)
        if self.filesystem.get_file_info(path).type != fs.FileType.File:
            return None
        with self.filesystem.open_input_stream(path) as stream:
            raw: bytes = stream.read()
            return raw

    @contextmanager
    def writing(self, name: str) -> Iterator[Any]:
        """A file to be written, which is there once the block is left without an error.

        Where there is no renaming (object stores), a file appears when it is closed.
        """
        path = self.file(name)
        if not self.is_local:
            with self.filesystem.open_output_stream(path) as stream:
                yield stream
            return
        head, _, tail = path.rpartition("/")
        hidden = f"{head}/.{tail}.{secrets.token_hex(4)}"
        try:
            with open(hidden, "wb") as stream:  # noqa: PTH123 (Arrow's has no fileno)
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(hidden, path)  # noqa: PTH105
        except BaseException:
            if os.path.exists(hidden):  # noqa: PTH110
                os.unlink(hidden)  # noqa: PTH108
            raise

    def move_to(self, other: Folder, name: str) -> None:
        """Moves a file to the same name in another folder of this filesystem, over one there."""
        self.filesystem.move(self.file(name), other.file(name))

    def write(self, name: str, raw: bytes) -> None:
        """A small file, whole."""
        with self.writing(name) as stream:
            stream.write(raw)


def name_of(unit: Unit) -> str:
    """Of its part."""
    return f"part-{unit.number:05}.parquet"


def schema(
    carried: pa.Schema, id_column: str | None, vectors: pa.DataType, told: dict[str, Any]
) -> pa.Schema:
    """Of all parts of a job.

    Args:
        carried: the types of what is read beside the text.
        id_column: which of them is the id; None: the row's number is.
        vectors: the type of an embedding.
        told: what the parts say of themselves.
    """
    kept = [one for one in carried if one.name != id_column]
    kind = carried.field(id_column).type if id_column else pa.int64()
    return pa.schema(
        [
            pa.field(ID, kind),
            *kept,
            pa.field(EMBEDDING, vectors, nullable=False),
            pa.field(TOKENS, pa.int32(), nullable=False),
            pa.field(TRUNCATED, pa.bool_(), nullable=False),
        ],
        metadata={METADATA: json.dumps(told, sort_keys=True)},
    )


class PartWriter:
    """Writes one part; a context manager. With an error in between, nothing is there."""

    def __init__(self, folder: Folder, unit: Unit, schema: pa.Schema) -> None:
        self._folder, self._unit, self._schema = folder, unit, schema
        self.done = Done(unit.number)
        self._bad: list[BadRow] = []
        self._tables: list[pa.Table] = []

    def __enter__(self) -> PartWriter:
        self._file = self._folder.writing(name_of(self._unit))
        plain = [one for one in self._schema.names if one != EMBEDDING]
        repeated = list(plain)
        if pa.types.is_integer(self._schema.field(EMBEDDING).type.value_type):
            # Parquet has no integers of one byte: these would take four. Their numbers in a
            # dictionary take one.
            repeated.append(f"{EMBEDDING}.list.element")
        self._writer = pq.ParquetWriter(
            self._file.__enter__(),
            self._schema,
            compression={one: "zstd" if one in plain else "none" for one in self._schema.names},
            use_dictionary=repeated,
            write_statistics=plain,
            write_page_checksum=True,
        )
        return self

    def add(self, table: pa.Table, bad: Sequence[BadRow], blank: int) -> None:
        """Some rows."""
        self._bad += bad
        self.done.bad.update(one.reason for one in bad)
        self.done.blank += blank
        self.done.rows += table.num_rows
        self.done.tokens += pc.sum(table[TOKENS]).as_py() or 0
        self.done.truncated += pc.sum(table[TRUNCATED]).as_py() or 0
        self._tables.append(table)
        if sum(one.num_rows for one in self._tables) >= GROUP_ROWS:
            self._write()

    def _write(self) -> None:
        if any(one.num_rows for one in self._tables):
            group = pa.concat_tables(self._tables).combine_chunks()
            self._writer.write_table(group, row_group_size=len(group))
        self._tables = []

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        if kind is not None:
            # Without the key of its unit it is nobody's part, should it stay.
            with suppress(OSError, pa.ArrowException):
                self._writer.close()
            self._file.__exit__(kind, error, traceback)
            return
        with ExitStack() as ending:
            ending.push(self._file.__exit__)
            self._write()
            self._writer.add_key_value_metadata({UNIT: self.done.to_json()})
            self._writer.close()
            _write_bad(self._folder, self._unit, self._bad)


def _write_bad(folder: Folder, unit: Unit, bad: Sequence[BadRow]) -> None:
    name = f"{BAD}/{name_of(unit)}"
    if bad:
        rows = [one._asdict() for one in bad]
        with folder.writing(name) as stream:
            pq.write_table(pa.Table.from_pylist(rows, _BAD_ROWS), stream)


def sound(folder: Folder, unit: Unit, schema: pa.Schema, *, wholly: bool) -> Done | None:
    """What the unit's part says came of it; None if it is not there, torn, or another's.

    Args:
        folder: where to look.
        unit: whose part it is to be.
        schema: that it is to have, with the job's metadata.
        wholly: reads all of it, with its checksums; else only its end.
    """
    try:
        with folder.filesystem.open_input_file(folder.file(name_of(unit))) as source:
            file = pq.ParquetFile(source, page_checksum_verification=True)
            met = file.schema_arrow
            done = Done.from_json(file.metadata.metadata[UNIT])
            done.was_there = True
            if (
                met.metadata.get(METADATA) != schema.metadata[METADATA]
                or not met.equals(schema, check_metadata=False)
                or (done.number, done.seen) != (unit.number, unit.rows)
                or file.metadata.num_rows != done.rows
            ):
                return None
            if wholly:
                for group in range(file.num_row_groups):
                    file.read_row_group(group)
        if done.bad:
            with folder.filesystem.open_input_file(folder.file(f"{BAD}/{name_of(unit)}")) as source:
                if pq.ParquetFile(source).metadata.num_rows != done.bad.total():
                    return None
    except _TORN:
        return None
    return done


def found(folders: Iterable[Folder], unit: Unit, schema: pa.Schema, *, wholly: bool) -> Done | None:
    """The same, of the first of these folders that has a sound one."""
    each = (sound(folder, unit, schema, wholly=wholly) for folder in folders)
    return next((done for done in each if done is not None), None)


def list_of(vectors: npt.NDArray[Any]) -> pa.DataType:
    """The type of an embedding, as of these vectors [N, D]."""
    return pa.list_(pa.from_numpy_dtype(vectors.dtype), vectors.shape[1])


def metadata_of(path: str) -> dict[str, Any]:
    """What a part says of itself.

    Raises:
        Incomplete: it is none of ours, or torn.
    """
    where, inside = filesystem(path)
    try:
        with where.open_input_file(inside) as source:
            return _bulk_format.told(pq.read_schema(source))
    except _TORN as error:
        raise Incomplete(f"{path} is no part of `arrowhead bulk embed`: {error}") from error
