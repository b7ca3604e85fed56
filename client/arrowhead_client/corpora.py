# SPDX-License-Identifier: Apache-2.0
"""Documents out of files: Parquet, JSON lines, CSV, or a folder of text.

    Parquet, JSON lines, CSV    a row is a document; columns are its id, its text and its fields
    what `arrowhead bulk` made  likewise, and its vector is known
    .txt, .md                   a file is a document; its id is its path within the folder

Read as a stream: of a file of any size, a few thousand rows are held.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from arrowhead_client._bulk_format import EMBEDDING, JOB, SUCCESS, TOKENS, TRUNCATED, told
from arrowhead_client._errors import InvalidInput
from arrowhead_client.datasets import in_microseconds, json_rows, parquet_rows
from arrowhead_client.documents import Document

_SEPARATORS = {".csv": ",", ".tsv": "\t"}
_JSON = (".jsonl", ".ndjson")
_BLOCK_BYTES = 16 << 20  # the longest row; types are told from the first block
_TEXTS = (".txt", ".md")
_WANTED = "wanted .parquet, .jsonl, .csv, .tsv, or a folder of .txt and .md"


@dataclass(frozen=True)
class Corpus:
    """The documents of a file or a folder; each iteration reads them anew.

    Attributes:
        source: the file, told by its ending, or the folder.
        id: the column of ids; numbers are taken as they are written.
        text: the columns of text; of several, those that are not empty are joined by a blank.
        fields: the columns that become fields; None: all others, but for those whose names begin
            with `_`, which no field's may.
    """

    source: Path
    id: str = "id"
    text: tuple[str, ...] = ("text",)
    fields: tuple[str, ...] | None = None

    def __iter__(self) -> Iterator[Document]:
        """The documents.

        Raises:
            InvalidInput: a file cannot be read, or a row has no id or no text; says where.
        """
        if self.is_embedded:
            return self._embedded()
        if self.source.is_dir() or self._ending in _TEXTS:
            return self._files()
        return (self._document(place, row) for place, row in self._rows())

    def __length_hint__(self) -> int:
        """How many there are, or 0 where that would take reading them."""
        if self.is_embedded:
            return sum(int(pq.read_metadata(part).num_rows) for part in self._parts())
        if self.source.is_dir():
            return sum(1 for _ in _text_files(self.source))
        if self._ending == ".parquet":
            try:
                return int(pq.read_metadata(self.source).num_rows)
            except (OSError, pa.ArrowException):
                return 0  # reading it will say why
        return 0

    @property
    def is_embedded(self) -> bool:
        """Whether it is a folder that `arrowhead bulk embed` has finished."""
        return (self.source / SUCCESS).exists() and (self.source / JOB).exists()

    def check_vectors(self, fingerprint: str, prompt: str) -> None:
        """Refuses vectors that an index of that model cannot hold.

        Args:
            fingerprint: of the model; see `ModelInfo`.
            prompt: what an index puts in front of its documents.

        Raises:
            InvalidInput: they are of another model, were cut or quantised, or made of something
                else than the documents.
        """
        for part in self._parts():
            met = _told(part)
            wanted: dict[str, tuple[object, ...]] = {
                "fingerprint": (fingerprint,),
                "dimensions": (met.get("dimension"),),
                "precision": ("float32", "float16"),
                "prompt": (prompt,),
            }
            for name, values in wanted.items():
                if met.get(name) not in values:
                    raise InvalidInput(
                        f"{part} has vectors of {name} {met.get(name)!r}; an index of this model "
                        f"wants {' or '.join(map(repr, values))}: run `arrowhead bulk embed` so"
                    )

    def _parts(self) -> list[Path]:
        return sorted(self.source.glob("part-*.parquet"))

    def _embedded(self) -> Iterator[Document]:
        for part in self._parts():
            for place, row in parquet_rows(part):
                vector = np.asarray(row.pop(EMBEDDING, None), np.float32)
                for name in (TOKENS, TRUNCATED):
                    row.pop(name, None)
                if missing := [name for name in self.text if name not in row]:
                    raise InvalidInput(
                        f"{part}: no column {missing[0]!r}: run `arrowhead bulk embed` with "
                        f"--keep {missing[0]}, for hits show their text; --text chooses another"
                    )
                yield self._document(place, row)._replace(vector=vector)

    @property
    def _ending(self) -> str:
        return self.source.suffix.lower()

    def _rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        ending = self._ending
        if ending == ".parquet":
            return parquet_rows(self.source)
        if ending in _JSON:
            return json_rows(self.source)
        if ending in _SEPARATORS:
            return self._csv_rows(_SEPARATORS[ending])
        raise InvalidInput(f"{self.source} ends in {ending!r}: {_WANTED}")

    def _csv_rows(self, separator: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """Numbers and dates are told from strings by Arrow, column by column."""
        quoted = separator == ","  # between tabs quotes are what they are, and a line is a row
        texts = {name: pa.string() for name in (self.id, *self.text)}
        try:
            with pyarrow.csv.open_csv(
                self.source,
                read_options=pyarrow.csv.ReadOptions(block_size=_BLOCK_BYTES),
                parse_options=pyarrow.csv.ParseOptions(
                    delimiter=separator,
                    quote_char='"' if quoted else False,
                    newlines_in_values=quoted,
                ),
                convert_options=pyarrow.csv.ConvertOptions(
                    column_types=texts,
                    null_values=[""],  # "NA" and "null" may be names
                    strings_can_be_null=True,
                    quoted_strings_can_be_null=False,
                ),
            ) as batches:
                number = 0
                for batch in batches:
                    for row in in_microseconds(batch).to_pylist():
                        number += 1
                        yield f"{self.source}, row {number}", row
        except (OSError, ValueError, pa.ArrowException) as error:
            raise InvalidInput(f"{self.source} cannot be read as CSV: {error}") from error

    def _document(self, place: str, row: Mapping[str, Any]) -> Document:
        missing = [name for name in (self.id, *self.text, *(self.fields or ())) if name not in row]
        if self._ending in _JSON and self.id in row and set(self.text) & set(row):
            missing = []  # in JSON lines, what is empty is often left out
        if missing:
            raise InvalidInput(
                f"{place}: no column {missing[0]!r} among {', '.join(map(repr, row))}; choose with "
                "--id, --text and --field"
            )
        name = row[self.id]
        if isinstance(name, bool) or not isinstance(name, (str, int)):
            raise InvalidInput(f"{place}: {self.id} is {name!r:.40}; wanted a string or a number")
        texts = [row.get(column) or "" for column in self.text]
        if not all(isinstance(text, str) for text in texts):
            raise InvalidInput(f"{place}: {', '.join(self.text)} are {texts!r:.80}; wanted strings")
        chosen = self.fields
        if chosen is None:  # `_` is how pandas calls what it keeps for itself
            used = (self.id, *self.text)
            chosen = tuple(one for one in row if one not in used and not one.startswith("_"))
        fields = {column: row.get(column) for column in chosen}
        return Document(str(name), " ".join(filter(None, texts)), fields)

    def _files(self) -> Iterator[Document]:
        folder, files = self.source, _text_files(self.source)
        if not self.source.is_dir():
            folder, files = self.source.parent, iter([self.source])
        empty = True
        for file in files:
            empty = False
            try:
                text = file.read_text(encoding="utf-8-sig")
            except UnicodeDecodeError as error:
                raise InvalidInput(f"{file} is not UTF-8 (byte {error.start})") from error
            except OSError as error:
                raise InvalidInput(f"cannot read {file}: {error.strerror or error}") from error
            yield Document(file.relative_to(folder).as_posix(), text)
        if empty:
            raise InvalidInput(f"{self.source} holds no .txt and no .md: {_WANTED}")


def _told(part: Path) -> dict[str, Any]:
    """What a file of `arrowhead bulk embed` says of its vectors."""
    try:
        return told(pq.read_schema(part))
    except (OSError, pa.ArrowException, LookupError, TypeError, ValueError) as error:
        raise InvalidInput(f"{part} is none of `arrowhead bulk embed`: {error}") from error


def _text_files(folder: Path) -> Iterator[Path]:
    """In order of their names; nothing hidden, such as what git keeps."""
    try:
        shown = sorted(one for one in folder.iterdir() if not one.name.startswith("."))
        folders = {one for one in shown if one.is_dir() and not one.is_symlink()}
        files = {one for one in shown if one.suffix.lower() in _TEXTS and one.is_file()}
    except OSError as error:
        raise InvalidInput(f"cannot read {folder}: {error.strerror or error}") from error
    for one in shown:
        if one in folders:
            yield from _text_files(one)
        elif one in files:
            yield one
