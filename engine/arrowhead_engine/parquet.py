# SPDX-License-Identifier: Apache-2.0
"""Reads what a Parquet file says of itself: its footer, and pages of a few values.

As much of Parquet as our own writer uses (docs/format.md): a footer, and column chunks that are one
PLAIN page each. Whatever the bytes, there is an answer, `Unreadable` or `Foreign`.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from arrowhead_engine import thrift
from arrowhead_engine.thrift import BINARY, I32, I64, LIST, STRUCT, Fields

MOST_FOOTER = 4 * 1024 * 1024  # bytes, for 5,000 tensors; any such bytes are read in seconds
MOST_PAGE_HEADER = 256  # bytes; our writer's take 15 to 40
_MOST_ENTRIES = 1000  # of the schema, and of the metadata
_MOST_DEPTH = 16  # of the schema

PLAIN, RLE = 0, 3  # encodings
UNCOMPRESSED, ZSTD, LZ4_RAW = 0, 6, 7  # codecs
_DATA_PAGE = 0
_KINDS = {0: "boolean", 1: "int32", 2: "int64", 4: "float", 5: "double", 6: "binary"}
_REPETITIONS = {0: "required", 1: "optional", 2: "repeated"}
_MEANINGS = {0: "UTF8", 3: "LIST", 13: "UINT_32"}

# The fields that are read (parquet.thrift), as number << 4 | type; one of another type is not it.
_SCHEMA, _ROW_GROUPS, _METADATA = 2 << 4 | LIST, 4 << 4 | LIST, 5 << 4 | LIST
_KIND, _REPETITION, _NAME = 1 << 4 | I32, 3 << 4 | I32, 4 << 4 | BINARY
_CHILDREN, _MEANING = 5 << 4 | I32, 6 << 4 | I32
_KEY, _VALUE = 1 << 4 | BINARY, 2 << 4 | BINARY
_CHUNKS, _NUM_ROWS = 1 << 4 | LIST, 3 << 4 | I64
_FILE_PATH, _CHUNK = 1 << 4 | BINARY, 3 << 4 | STRUCT
_ENCODINGS, _CODEC, _NUM_VALUES = 2 << 4 | LIST, 4 << 4 | I32, 5 << 4 | I64
_PLAIN_BYTES, _STORED_BYTES = 6 << 4 | I64, 7 << 4 | I64
_OFFSET, _DICTIONARY = 9 << 4 | I64, 11 << 4 | I64
_PAGE_KIND, _PAGE_PLAIN_BYTES, _PAGE_STORED_BYTES = 1 << 4 | I32, 2 << 4 | I32, 3 << 4 | I32
_PAGE, _PAGE_VALUES, _PAGE_ENCODING = 5 << 4 | STRUCT, 1 << 4 | I32, 2 << 4 | I32

# What ends a chunk's fields: number of values, bytes before and after compression, offset, each
# after the byte for its number and type; statistics of encodings (I) and of sizes (<), not read.
_SIZES = re.compile(
    rb"\x16(V)\x16(V)\x16(V)&(V)"
    rb"(?:I\x1c(?:\x15V){3}\x00)?"
    rb"(?:<(?:\x16V)?(?:[\x19\x29](?:\x06|\x16V|&VV)){0,2}\x00)?"
    rb"\x00\x00".replace(b"V", thrift.VARINT),
    re.DOTALL,
)


class Unreadable(Exception):
    """Bytes that are not Parquet's."""


class Foreign(Exception):
    """Parquet, but not as our writer writes it. The message says what was met."""


class Column(NamedTuple):
    """A top-level column.

    Attributes:
        name: its name.
        type: as Parquet writes schemas, without names: "required binary (UTF8)".
        leaf: the place of its first chunk in a row group.
    """

    name: str
    type: str
    leaf: int


class Chunk(NamedTuple):
    """What a column holds in a row group: pages, each with a header.

    Attributes:
        num_values: of a list, its elements; of an empty one, one.
        plain_bytes: what its pages and their headers would take uncompressed.
        stored_bytes: what they take in the file.
        offset: where the first data page's header starts in the file.
        codec: how it is compressed.
        plain: whether it has no encoding but PLAIN (and RLE, which levels have), no dictionary.
    """

    num_values: int
    plain_bytes: int
    stored_bytes: int
    offset: int
    codec: int
    plain: bool


class RowGroup(NamedTuple):
    """So many rows, and a chunk for each leaf column."""

    num_rows: int
    chunks: list[Chunk]


class Footer(NamedTuple):
    """What the end of a Parquet file says of the rest."""

    columns: list[Column]
    row_groups: list[RowGroup]
    metadata: dict[str, str]


def read_footer(raw: bytes) -> Footer:
    """The footer, given without the length and the magic after it.

    Raises:
        Unreadable: it is none, or larger than any weight file's.
    """
    if len(raw) > MOST_FOOTER:
        raise Unreadable(f"it takes {len(raw)} bytes, {MOST_FOOTER} at most")
    try:
        fields, _ = thrift.struct(
            raw,
            0,
            {
                _SCHEMA: lambda raw, at: thrift.sequence(raw, at, thrift.struct, _MOST_ENTRIES),
                _ROW_GROUPS: _RowGroups(),
                _METADATA: lambda raw, at: thrift.sequence(raw, at, thrift.struct, _MOST_ENTRIES),
            },
        )
        columns, leaves = _columns(fields[_SCHEMA])
        groups: list[RowGroup] = fields[_ROW_GROUPS]
        metadata = {
            _text(entry[_KEY]): _text(entry.get(_VALUE, b"")) for entry in fields.get(_METADATA, [])
        }
    except IndexError as error:
        raise Unreadable("it ends too early") from error
    except KeyError as error:
        raise Unreadable(f"field {error.args[0] >> 4} of a struct is missing") from error
    except thrift.Malformed as error:
        raise Unreadable(str(error)) from error
    for number, group in enumerate(groups):
        if len(group.chunks) != leaves:
            raise Unreadable(f"row group {number} has {len(group.chunks)} columns, not {leaves}")
    return Footer(columns, groups, metadata)


class _Before(NamedTuple):
    """What chunks of a column have in common: their bytes up to the sizes, and what those say."""

    begin: bytes
    codec: int
    plain: bool


_NONE = _Before(b"", -1, False)  # which no pattern follows


class _RowGroups:
    """Reads the list of row groups.

    A chunk differs from that of the row group before in its sizes and its offset only, mostly.
    There, comparing and one pattern do in a quarter of the time what `_any_chunk` does.
    """

    def __init__(self) -> None:
        self._before: list[_Before] = []  # by column

    def __call__(self, raw: bytes, at: int) -> tuple[list[RowGroup], int]:
        return thrift.sequence(raw, at, self._group)

    def _group(self, raw: bytes, at: int) -> tuple[RowGroup, int]:
        fields, at = thrift.struct(raw, at, {_CHUNKS: self._chunks})
        return RowGroup(fields[_NUM_ROWS], fields[_CHUNKS]), at

    def _chunks(self, raw: bytes, at: int) -> tuple[list[Chunk], int]:
        count, _, at = thrift.list_head(raw, at)
        chunks: list[Chunk] = []
        for column in range(count):
            begin, codec, plain = self._before[column] if column < len(self._before) else _NONE
            if raw.startswith(begin, at) and (rest := _SIZES.match(raw, at + len(begin))):
                values, plain_bytes, stored, offset = map(_integer, rest.groups())
                chunks.append(Chunk(values, plain_bytes, stored, offset, codec, plain))
                at = rest.end()
            else:
                chunk, at = self._any_chunk(raw, at, column)
                chunks.append(chunk)
        return chunks, at

    def _any_chunk(self, raw: bytes, at: int, column: int) -> tuple[Chunk, int]:
        starts: dict[int, int] = {}
        outer, end = thrift.struct(
            raw, at, {_CHUNK: lambda raw, at: thrift.struct(raw, at, starts=starts)}
        )
        if _FILE_PATH in outer:
            raise thrift.Malformed("a column lies in another file")
        fields = outer[_CHUNK]
        plain = _DICTIONARY not in fields and _are_plain(fields[_ENCODINGS])
        chunk = Chunk(
            fields[_NUM_VALUES],
            fields[_PLAIN_BYTES],
            fields[_STORED_BYTES],
            fields[_OFFSET],
            fields[_CODEC],
            plain,
        )
        before = _Before(raw[at : starts[_NUM_VALUES]], chunk.codec, plain)
        self._before[column : column + 1] = [before]
        return chunk, end


def _are_plain(encodings: bytes) -> bool:
    return set(thrift.sequence(encodings, 0, thrift.integer)[0]) <= {PLAIN, RLE}


def _integer(varint: bytes) -> int:
    value = 0
    for byte in reversed(varint):
        value = value << 7 | byte & 127
    return value >> 1 ^ -(value & 1)


def _columns(schema: list[Fields]) -> tuple[list[Column], int]:
    """The top-level columns, and how many leaves they have together."""
    columns: list[Column] = []
    at, leaf = 1, 0
    for _ in range(schema[0].get(_CHILDREN, 0)):
        name = _text(schema[at][_NAME])
        type_, at, leaves = _described(schema, at, 0)
        columns.append(Column(name, type_, leaf))
        leaf += leaves
    return columns, leaf


def _described(schema: list[Fields], at: int, depth: int) -> tuple[str, int, int]:
    """An entry of the schema and what is in it, in words; where the next one is; its leaves."""
    if depth > _MOST_DEPTH:
        raise thrift.Malformed(f"a schema more than {_MOST_DEPTH} deep")
    entry = schema[at]
    at += 1
    kind = "group" if _KIND not in entry else _KINDS.get(entry[_KIND], "other")
    words = f"{_REPETITIONS.get(entry[_REPETITION], 'other')} {kind}"
    if _MEANING in entry:
        words += f" ({_MEANINGS.get(entry[_MEANING], entry[_MEANING])})"
    if _KIND in entry:
        return words, at, 1
    inner, leaves = [], 0
    for _ in range(entry.get(_CHILDREN, 0)):
        type_, at, below = _described(schema, at, depth + 1)
        inner.append(type_)
        leaves += below
    return f"{words} {{ {'; '.join(inner)} }}", at, leaves


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "replace")


class PageHeader(NamedTuple):
    """What stands before a PLAIN data page.

    Attributes:
        raw: the header itself.
        num_values: as in `Chunk`.
        plain_bytes: what the page takes uncompressed.
        stored_bytes: what it takes in the file.
    """

    raw: bytes
    num_values: int
    plain_bytes: int
    stored_bytes: int


def read_page_header(raw: bytes) -> PageHeader:
    """The page header with which `raw` begins.

    Raises:
        Unreadable: it begins with none.
        Foreign: it is a dictionary's, or of a page that is not PLAIN.
    """
    try:
        header, end = thrift.struct(raw, 0, {_PAGE: thrift.struct})
        if header[_PAGE_KIND] != _DATA_PAGE or header[_PAGE][_PAGE_ENCODING] != PLAIN:
            raise Foreign("has a dictionary, or pages that are not plain ones of version 1")
        return PageHeader(
            raw[:end],
            header[_PAGE][_PAGE_VALUES],
            header[_PAGE_PLAIN_BYTES],
            header[_PAGE_STORED_BYTES],
        )
    except (IndexError, KeyError, thrift.Malformed) as error:
        raise Unreadable("its page header is damaged") from error


class Pages:
    """Reads the chunks of one column, each a PLAIN page that is not compressed.

    A header that stood before a page of the same size is not read again.
    """

    def __init__(self) -> None:
        self._met: dict[int, PageHeader] = {}  # by the size of header and page

    def __call__(self, raw: bytes, num_values: int) -> bytes:
        """The page in the chunk `raw` of so many values.

        Raises:
            Unreadable: it is damaged.
            Foreign: it is not one page, or not a PLAIN one.
        """
        header = self._met.get(len(raw))
        if header is None or not raw.startswith(header.raw):
            header = self._met[len(raw)] = read_page_header(raw)
        page = raw[len(header.raw) :]
        if header.stored_bytes != len(page) or header.num_values != num_values:
            raise Foreign(f"has not its {num_values} values in one page of {len(page)} bytes")
        if header.plain_bytes != len(page):
            raise Foreign("is compressed")
        return page


def read_text(page: bytes, num_values: int) -> str:
    """The one string of a page.

    Raises:
        Unreadable: there is none, as in the readers below.
    """
    if num_values != 1 or len(page) < 4 or int.from_bytes(page[:4], "little") != len(page) - 4:
        raise Unreadable(f"a page of {len(page)} bytes that is not one string")
    try:
        return page[4:].decode()
    except UnicodeDecodeError as error:
        raise Unreadable(f"it is not UTF-8: {error}") from error


def read_int64(page: bytes, num_values: int) -> int:
    """The one int64 of a page."""
    return int.from_bytes(_single(page, num_values, 8), "little", signed=True)


def read_uint32(page: bytes, num_values: int) -> int:
    """The one uint32 of a page."""
    return int.from_bytes(_single(page, num_values, 4), "little")


def read_boolean(page: bytes, num_values: int) -> bool:
    """The one boolean of a page."""
    return bool(_single(page, num_values, 1)[0] & 1)


def _single(page: bytes, num_values: int, width: int) -> bytes:
    if num_values != 1 or len(page) != width:
        raise Unreadable(f"{num_values} values in {len(page)} bytes, not one in {width}")
    return page


def read_list(page: bytes, num_values: int, width: int) -> bytes:
    """The values, each of so many bytes, of the one list of a page; neither may be null.

    Before them stand two levels for each: 0 for the first of a list and 1 for all others, then 1
    for each. Of an empty list, which counts as one value, both are 0.
    """
    if num_values < 1 or (num_values > 1 and num_values * width > len(page)):
        raise Unreadable(f"its page of {len(page)} bytes has no room for {num_values} values")
    try:
        repetition, at = _levels(page, 0, num_values)
        definition, at = _levels(page, at, num_values)
    except (IndexError, thrift.Malformed) as error:
        raise Unreadable("the levels of its list are damaged") from error
    empty = num_values == 1 and definition == b"\0"
    whole = definition == b"\1" * num_values
    if repetition != b"\0" + b"\1" * (num_values - 1) or not (empty or whole):
        raise Unreadable("its levels are not those of one list")
    values = page[at:]
    if len(values) != (0 if empty else num_values * width):
        raise Unreadable(f"its list of {num_values} values takes {len(values)} bytes")
    return values


def _levels(page: bytes, at: int, count: int) -> tuple[bytes, int]:
    """So many levels of one bit, a byte each, and where they end.

    They are stored as their size in 4 bytes and runs. A run is a varint: twice a number, and the
    level that is repeated so often; or twice a number plus one, and so many bytes of eight levels.
    """
    end = at + 4 + int.from_bytes(page[at : at + 4], "little")
    if end > len(page):
        raise IndexError
    at += 4
    levels = bytearray()
    while at < end and len(levels) < count:
        run, at = thrift.varint(page, at)
        if run & 1:
            packed = page[at : min(at + (run >> 1), at + (count - len(levels) + 7) // 8, end)]
            at += run >> 1
            levels += bytes(byte >> bit & 1 for byte in packed for bit in range(8))
        else:
            levels += page[at : at + 1] * min(run >> 1, count - len(levels))
            at += 1
    return bytes(levels[:count]), end
