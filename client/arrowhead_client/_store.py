# SPDX-License-Identifier: Apache-2.0
"""Passages and their vectors on disk: LanceDB behind one small class.

A row is a passage: its document's `id`, its own `text` and `_vector`, which `_part` of the document
it is, the `_hash` of the document's whole text, and the document's fields, a column each. What the
index is of (`Description`) stands in the table's own metadata, so it is there when the table is.

Each change is one commit of LanceDB's: a reader sees the table before it or after it, and a process
that is killed leaves the one before. One process writes at a time, told by a lock that the kernel
lifts when its holder dies. LanceDB's errors become ours here, and it is imported here alone.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arrowhead_client._algebra import Vectors
from arrowhead_client._errors import (
    IndexBusy,
    IndexDamaged,
    IndexExists,
    IndexFailed,
    IndexNotFound,
    InvalidInput,
    NotInstalled,
)

if TYPE_CHECKING:
    import pyarrow as pa
    from lancedb.table import Table

ID, TEXT, PART, HASH, VECTOR = "id", "text", "_part", "_hash", "_vector"
OWN = (ID, TEXT, PART, HASH, VECTOR)
HASH_BYTES = 16

# Passages up to which each is compared; above, an index of vectors is kept: every passage in one
# byte a component (IVF_SQ), in cells of some 8,000. Of these `_CELLS` are looked at: all, up to
# some 260,000 passages. What both cost and find, up to 200,000, is in perf/results/search.md.
EXACT_UNTIL = 20_000
_CELLS = 32
_REFINED = 4  # times the hits that are wanted

_FORMAT = 1  # counts up, too, when texts are cut into passages in another way
_TABLE = "documents"
_METADATA = b"arrowhead"
_IDS_AT_ONCE = 1000  # in one filter
_MOST_FRAGMENTS = 64  # files of a table; each search opens all
_PLAIN = re.compile("[a-z_][a-z0-9_]*")  # names that need no backticks in a filter
_SHOWN = 200  # characters of a filter, in an error
_GRACE = timedelta(minutes=1)  # a search that began before a clean-up still finds its files


@dataclass(frozen=True)
class Description:
    """What an index is of.

    Attributes:
        model: the name of the model that its vectors are of, where it was made.
        fingerprint: of the space of its vectors; see `ModelInfo`.
        dimension: D.
        format: of the table.
    """

    model: str
    fingerprint: str
    dimension: int
    format: int = _FORMAT


class Store:
    """A table of passages in a folder. May be shared by threads."""

    def __init__(self, path: Path, table: Table) -> None:
        self.path = path
        self._table: Any = table  # its own types lack some of what it does

    @classmethod
    def create(cls, path: Path, description: Description) -> Store:
        """Makes an empty one; the folder may be there.

        Raises:
            NotInstalled: no LanceDB.
            IndexExists: one is there already.
            IndexBusy: another process is making it.
            IndexFailed: the folder cannot be made or written to.
        """
        import pyarrow as pa

        schema = pa.schema(
            [
                pa.field(ID, pa.string(), nullable=False),
                pa.field(TEXT, pa.string(), nullable=False),
                pa.field(PART, pa.int32(), nullable=False),
                pa.field(HASH, pa.binary(HASH_BYTES), nullable=False),
                pa.field(VECTOR, pa.list_(pa.float32(), description.dimension), nullable=False),
            ],
            metadata={_METADATA: json.dumps(asdict(description))},
        )
        lancedb = _lancedb()
        with _lock(path), _errors(path):
            if _is_there(path):
                raise IndexExists(f"{path} is an index already: add to it, or name another folder")
            return cls(path, _database(lancedb, path).create_table(_TABLE, schema=schema))

    @classmethod
    def open(cls, path: Path) -> Store:
        """The one in a folder.

        Raises:
            NotInstalled: no LanceDB.
            IndexNotFound: there is none.
            IndexDamaged: it cannot be read.
        """
        lancedb = _lancedb()
        if not _is_there(path):
            raise IndexNotFound(
                f"{path} holds no index: `arrowhead index build` makes one, or name its folder"
            )
        with _errors(path):
            return cls(path, _database(lancedb, path).open_table(_TABLE))

    @property
    def schema(self) -> pa.Schema:
        """The columns, `OWN` and a field each."""
        with _errors(self.path):
            schema: pa.Schema = self._table.schema
            return schema

    @property
    def fields(self) -> list[str]:
        """The names of the documents' fields."""
        return [name for name in self.schema.names if name not in OWN]

    @property
    def description(self) -> Description:
        """What it is of.

        Raises:
            IndexDamaged: the table does not say, or is of another format.
        """
        try:
            told = json.loads(self.schema.metadata[_METADATA])
            if told["format"] == _FORMAT:
                return Description(**told)
            met = f"its format is {told['format']}, and this version reads {_FORMAT}"
        except (TypeError, LookupError, ValueError):
            met = "its table is not one of ours"
        raise IndexDamaged(f"{self.path} is no index that can be read: {met}. Build it anew")

    def documents(self) -> int:
        """How many there are."""
        with _errors(self.path):
            return int(self._table.count_rows(f"{PART} = 0"))

    def passages(self) -> int:
        """How many there are, of all documents together."""
        with _errors(self.path):
            return int(self._table.count_rows())

    def size_bytes(self) -> int:
        """On disk, what a clean-up has not removed yet included."""
        size = 0
        for folder, _, files in os.walk(self.path):
            for file in files:
                with suppress(FileNotFoundError):  # a clean-up may be under way
                    size += Path(folder, file).stat().st_size
        return size

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Holds the lock that whoever changes the table needs.

        Raises:
            IndexBusy: somebody else holds it.
        """
        with _lock(self.path):
            yield

    def add_fields(self, fields: Sequence[pa.Field]) -> None:
        """Adds columns, which are null in all rows there are."""
        with _errors(self.path):
            self._table.add_columns(list(fields))

    def rows(
        self, ids: Sequence[str], columns: Sequence[str], where: str | None = None
    ) -> pa.Table:
        """Columns of the passages of these documents, in no order."""
        import pyarrow as pa

        found = []
        with _errors(self.path):
            for some in _chunks(ids):
                chosen = _among(some) if where is None else f"{_among(some)} AND {where}"
                query = self._table.search().where(chosen).select(list(columns))
                found.append(query.limit(max(1, self._table.count_rows())).to_arrow())
        return pa.concat_tables(found)

    def put(self, rows: pa.Table, replaced: Sequence[str]) -> None:
        """Adds passages; those of the documents `replaced` go, all in one commit."""
        with _errors(self.path):
            if not replaced:
                self._table.add(rows)
                return
            (
                self._table.merge_insert([ID, PART])
                .when_matched_update_all()
                .when_not_matched_insert_all()
                .when_not_matched_by_source_delete(_among(replaced))
                .execute(rows)
            )

    def delete(self, ids: Sequence[str]) -> int:
        """Removes documents; how many of these there were.

        Raises:
            IndexBusy: somebody else is writing.
        """
        removed = 0
        with self.writing(), _errors(self.path):
            for some in _chunks(list(dict.fromkeys(ids))):
                chosen = _among(some)
                there = int(self._table.count_rows(f"{chosen} AND {PART} = 0"))
                if there:
                    self._table.delete(chosen)
                removed += there
            self.tidy()
        return removed

    def tidy(self) -> None:
        """Joins files, if there are many, and brings the index of vectors up to date."""
        with _errors(self.path):
            many = self._table.stats()["fragment_stats"]["num_fragments"] > _MOST_FRAGMENTS
            indexed = any(VECTOR in one.columns for one in self._table.list_indices())
            if many or (indexed and self._unindexed() > EXACT_UNTIL):
                # Unverified: what a killed writer left; the lock says that no other one writes.
                self._table.optimize(cleanup_older_than=_GRACE, delete_unverified=True)
            if not indexed and self._table.count_rows() > EXACT_UNTIL:
                self.index_vectors()

    def index_vectors(self) -> None:
        """Makes searches quicker, and finding documents by id.

        Searches then read one byte a component of each passage in `_CELLS` cells of some 8,000
        passages: of all of them up to some 260,000, above of a part only.
        """
        from lancedb.index import BTree, IvfSq

        with _errors(self.path):
            # The vectors' last: by it `tidy` tells whether both were made.
            self._table.create_index(ID, config=BTree())
            self._table.create_index(VECTOR, config=IvfSq(distance_type="cosine"))

    def _unindexed(self) -> int:
        told = self._table.index_stats(f"{VECTOR}_idx")
        return 0 if told is None else int(told.num_unindexed_rows)

    def search(self, vector: Vectors, limit: int, where: str | None) -> list[dict[str, Any]]:
        """The passages of the highest cosine with a vector [D], the best first.

        Returns:
            of each, `id`, `text`, the fields, and `_distance`, 1 less the cosine.

        Raises:
            InvalidInput: the filter cannot be read.
        """
        columns = [ID, TEXT, "_distance", *self.fields]
        query = (
            self._table.search(vector, vector_column_name=VECTOR)
            .distance_type("cosine")
            .select(columns)
            .limit(limit)
            # Of an index of vectors, if there is one: more than these cells only where a filter
            # leaves too few in them; the best are scored by the vectors themselves.
            .minimum_nprobes(_CELLS)
            .maximum_nprobes(0)
            .refine_factor(_REFINED)
        )
        try:
            # In brackets, or all that follows a complete expression would be ignored.
            return list((query if where is None else query.where(f"({where})")).to_list())
        except (RuntimeError, ValueError, OSError) as error:
            if where is None:
                raise _damaged(self.path, error) from error
            self.search(vector, 1, None)  # raises, if it is not the filter that fails
            raise InvalidInput(
                f"the filter {where[:_SHOWN]!r} cannot be used ({_said(error)}). Fields: "
                f"{self._known_fields()}; such as: year > 2020 AND source = 'a'"
            ) from error

    def _known_fields(self) -> str:
        schema = self.schema
        return ", ".join(
            f"{name if _PLAIN.fullmatch(name) else f'`{name}`'} ({schema.field(name).type})"
            for name in (ID, *self.fields)
        )


def _lancedb() -> Any:
    try:
        import lancedb

        return lancedb
    except ModuleNotFoundError as error:
        raise NotInstalled(
            f"an index needs {error.name}, which is not installed: pip install 'arrowhead[search]'"
        ) from error


def _database(lancedb: Any, path: Path) -> Any:
    # Zero: each read sees what was written before it, by whichever process.
    return lancedb.connect(path, read_consistency_interval=timedelta(0))


def _is_there(path: Path) -> bool:
    return any((path / f"{_TABLE}.lance" / "_versions").glob("*.manifest"))


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    from filelock import FileLock, Timeout  # of the extra, as LanceDB

    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path / "write.lock")
        lock.acquire(timeout=0)
    except Timeout as error:
        raise IndexBusy(
            f"somebody else is writing to {path}: wait until that ends, and try again"
        ) from error
    except OSError as error:
        raise IndexFailed(
            f"cannot write to {path} ({error.strerror or error}): name a folder that can be made "
            "and written to"
        ) from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _errors(path: Path) -> Iterator[None]:
    """LanceDB's errors as ours: it tells of a file that is damaged or gone in all of these."""
    try:
        yield
    except (RuntimeError, ValueError, OSError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> IndexDamaged:
    return IndexDamaged(
        f"{path} cannot be read or written ({_said(error)}). If its files are damaged, build it "
        "anew"
    )


def _said(error: Exception) -> str:
    """What LanceDB says, without the place in its source and the columns that are not for users."""
    said = " ".join(str(error).split()).partition(", /")[0].partition(" Valid fields are")[0]
    return said.removeprefix("Invalid input, ").removeprefix("lance error: ")


def _among(ids: Sequence[str]) -> str:
    if not ids:
        return "false"
    quoted = ", ".join("'" + one.replace("'", "''") + "'" for one in ids)
    return f"{ID} IN ({quoted})"


def _chunks(ids: Sequence[str]) -> Iterator[Sequence[str]]:
    # One, empty, of none: its answer has the columns.
    return (ids[at : at + _IDS_AT_ONCE] for at in range(0, max(len(ids), 1), _IDS_AT_ONCE))
