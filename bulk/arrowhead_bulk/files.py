# SPDX-License-Identifier: Apache-2.0
"""Files of rows, wherever Arrow can read them: which there are, and the lines of those of text."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
from pyarrow import fs

from arrowhead_bulk.errors import BadCorpus

FORMATS = {".parquet": "parquet", ".jsonl": "json", ".ndjson": "json", ".csv": "csv", ".tsv": "tsv"}
CODECS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".lz4": "lz4"}  # of text
MOST_LINE = 64 << 20  # bytes; a stray quote would make one field of the rest of a CSV file
_BLOCK_BYTES = 1 << 20
_WILD = frozenset("*?[")
_WANTED = f"wanted {', '.join(FORMATS)}; of these text may end in {', '.join(CODECS)}, too"

csv.field_size_limit(MOST_LINE)


@dataclass(frozen=True)
class File:
    """One file.

    Attributes:
        path: within its filesystem.
        format: "parquet", "json", "csv" or "tsv".
        codec: what it is compressed with, and so can only be read from its beginning; or "".
        size, modified_ns: what it was when the job was planned; a change is noticed by them.
        rows: how many it has; lines, of JSON.
        first: the number of its first row in the corpus.
        names: of the columns, where the file's first line tells them.
    """

    path: str
    format: str
    codec: str
    size: int
    modified_ns: int
    rows: int = 0
    first: int = 0
    names: tuple[str, ...] = ()


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


def find(sources: Sequence[str]) -> tuple[list[File], str]:
    """The files, in the order of their names, and a URI of their filesystem ("": this machine's).

    Args:
        sources: files, folders, or patterns such as `corpus/*.parquet`; paths or URIs.

    Raises:
        BadCorpus: nothing is there.
    """
    roots, files = set(), dict[str, File]()
    for source in sources:
        where, path = filesystem(source)
        roots.add(_root(where, source))
        found = [info for info in _infos(where, path) if _format(info.path) or info.path == path]
        if not found:
            raise BadCorpus(f"{source}: nothing there; {_WANTED}")
        for info in found:
            if not (form := _format(info.path)):
                raise BadCorpus(f"{info.path}: {_WANTED}")
            files[info.path] = File(
                info.path, form, _codec(info.path)[1], info.size, int(info.mtime_ns or 0)
            )
    if len(roots) > 1:
        raise BadCorpus(f"files of {len(roots)} filesystems ({', '.join(sorted(roots))}): give one")
    return [files[path] for path in sorted(files)], roots.pop()


def _root(where: fs.FileSystem, source: str) -> str:
    if isinstance(where, fs.LocalFileSystem):
        return ""
    scheme, _, rest = source.partition("://")
    place, _, query = rest.partition("?")  # which may say how to reach it: endpoint_override=...
    return f"{scheme}://{place.partition('/')[0]}/" + (f"?{query}" if query else "")


def _infos(where: fs.FileSystem, path: str) -> Iterator[fs.FileInfo]:
    """Of a file, of all below a folder, or of all that fit a pattern; nothing that is hidden."""
    if "**" in path:
        raise BadCorpus(f"{path}: ** is not known; the name of a folder takes all that is below it")
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


def _codec(path: str) -> tuple[str, str]:
    """The name without the ending that tells what it is compressed with, and that."""
    name = path.lower()
    for ending, codec in CODECS.items():
        if name.endswith(ending):
            return name.removesuffix(ending), codec
    return name, ""


def _format(path: str) -> str:
    name, codec = _codec(path)
    found = next((form for ending, form in FORMATS.items() if name.endswith(ending)), "")
    return "" if codec and found == "parquet" else found


def opened(where: fs.FileSystem, file: File, start: int = 0) -> Any:
    """A file of text from a byte on, as a stream of plain bytes."""
    if file.codec:
        stream = where.open_input_stream(file.path, compression=file.codec)
        stream.read(start)  # the names of columns, at most
        return stream
    stream = where.open_input_file(file.path)
    stream.seek(start)
    return stream


def read_rows(
    where: fs.FileSystem, file: File, start: int, end: int
) -> Iterator[tuple[list[str] | None, int]]:
    """The rows of a CSV or TSV file between two bytes, and after each the byte where it ends.

    A row is None where it cannot be read at all. Bytes that are no UTF-8 come as surrogates.
    """
    lines = Lines(where, file, start, end)
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


class Lines:
    """Lines of a file between two bytes (`end` -1: to its end), with their ends.

    Of one that is longer than `MOST_LINE` no more than its beginning is given, and still too much.

    Attributes:
        consumed: the byte behind the last line that was given.
    """

    def __init__(self, where: fs.FileSystem, file: File, start: int, end: int) -> None:
        self.consumed = start
        self._where, self._file, self._end = where, file, end

    def __iter__(self) -> Iterator[bytes]:
        with opened(self._where, self._file, self.consumed) as stream:
            parts, size = list[bytes](), 0  # of a line whose end is not here yet
            while block := stream.read(_BLOCK_BYTES):
                first, *rest = block.split(b"\n")
                size += len(first)
                if size <= MOST_LINE + _BLOCK_BYTES:
                    parts.append(first)
                if not rest:
                    continue
                if self._is_over():
                    return
                self.consumed += size + 1
                yield b"".join([*parts, b"\n"])
                last = rest.pop()
                for line in rest:
                    if self._is_over():
                        return
                    self.consumed += len(line) + 1
                    yield line + b"\n"
                parts, size = [last], len(last)
            if size and not self._is_over():
                self.consumed += size
                yield b"".join(parts)

    def _is_over(self) -> bool:
        return 0 <= self._end <= self.consumed

    def decoded(self) -> Iterator[str]:
        """As text; a mark at the beginning of a file is none of it."""
        is_first = self.consumed == 0
        for line in self:
            text = line.decode("utf-8", "surrogateescape")
            yield text.removeprefix("\ufeff") if is_first else text
            is_first = False
