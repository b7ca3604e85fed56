# SPDX-License-Identifier: Apache-2.0
"""Our reading of Parquet beside pyarrow's, and of its parts beside what the format says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arrowhead_engine import parquet, thrift
from arrowhead_engine.weightfile import Tensor
from arrowhead_engine.weightwriter import write


def footer(raw: bytes) -> bytes:
    return raw[-8 - int.from_bytes(raw[-8:-4], "little") : -8]


def assert_agrees(raw: bytes) -> None:
    """Every number that we read of a footer is the one that pyarrow reads."""
    ours, theirs = parquet.read_footer(footer(raw)), pq.read_metadata(pa.BufferReader(raw))
    assert [column.name for column in ours.columns] == theirs.schema.to_arrow_schema().names
    assert len(ours.row_groups) == theirs.num_row_groups
    for number, (num_rows, chunks) in enumerate(ours.row_groups):
        group = theirs.row_group(number)
        assert (num_rows, len(chunks)) == (group.num_rows, group.num_columns)
        for column, chunk in enumerate(chunks):
            met = group.column(column)
            assert chunk[:4] == (
                met.num_values,
                met.total_uncompressed_size,
                met.total_compressed_size,
                met.data_page_offset,
            )
            plain = set(met.encodings) <= {"PLAIN", "RLE"} and not met.has_dictionary_page
            assert chunk.plain is plain
    wanted = {key.decode(): value.decode() for key, value in (theirs.metadata or {}).items()}
    assert ours.metadata == wanted


@pytest.mark.parametrize("compression", ["none", "lz4", "zstd"])
@pytest.mark.parametrize("pattern", [None, re.compile(b"(?!)")], ids=["fast", "field by field"])
def test_footers_of_our_own_are_read_as_pyarrow_reads_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compression: Any, pattern: Any
) -> None:
    """Also where no chunk looks as the pattern wants it."""
    if pattern is not None:
        monkeypatch.setattr(parquet, "_SIZES", pattern)
    path = tmp_path / "weights.parquet"
    shapes = [(), (3,), (200, 300), (0, 7), (2, 3, 4)] * 5
    tensors = []
    for number, shape in enumerate(shapes):
        size = 1
        for n in shape:
            size *= n
        tensors.append(Tensor(f"{'n' * number}.{number}", "float16", shape, bytes(2 * size)))
    write(path, tensors, {"note": "kept"}, compression)
    assert_agrees(path.read_bytes())


@pytest.mark.parametrize(
    "options", [{}, {"use_dictionary": False}, {"write_page_index": True}], ids=str
)
def test_footers_of_others_are_read_as_pyarrow_reads_them(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    table = pa.table({"a": range(1000), "b": ["x", None] * 500, "c": [[{"d": 1.5}], []] * 500})
    path = tmp_path / "other.parquet"
    pq.write_table(table, path, row_group_size=100, **options)
    assert_agrees(path.read_bytes())


@given(st.binary(max_size=200))
def test_bytes_are_a_footer_or_unreadable(raw: bytes) -> None:
    for read in (parquet.read_footer, parquet.read_page_header):
        try:
            read(raw)
        except (parquet.Unreadable, parquet.Foreign):
            continue


@given(st.binary(max_size=40), st.integers(-2, 2**40), st.sampled_from([4, 8]))
def test_bytes_are_a_list_or_unreadable(page: bytes, num_values: int, width: int) -> None:
    try:
        values = parquet.read_list(page, num_values, width)
    except parquet.Unreadable:
        return
    assert len(values) in (0, num_values * width)


def levels(*runs: bytes) -> bytes:
    return len(b"".join(runs)).to_bytes(4, "little") + b"".join(runs)


@pytest.mark.parametrize(
    ("page", "num_values", "values"),
    [
        (levels(b"\2\0") + levels(b"\2\0"), 1, b""),
        (levels(b"\2\0") + levels(b"\2\1") + b"abcd", 1, b"abcd"),
        (levels(b"\3\xfe") + levels(b"\6\1") + b"abcdefghijkl", 3, b"abcdefghijkl"),
        (levels(b"\2\0", b"\4\1") + levels(b"\3\7") + b"abcdefghijkl", 3, b"abcdefghijkl"),
    ],
    ids=["empty", "one", "packed", "runs"],
)
def test_lists_are_read(page: bytes, num_values: int, values: bytes) -> None:
    assert parquet.read_list(page, num_values, 4) == values


@pytest.mark.parametrize(
    ("page", "num_values"),
    [
        (levels(b"\4\0") + levels(b"\4\1") + b"abcdefgh", 2),
        (levels(b"\3\2") + levels(b"\3\1") + b"abcd", 2),
        (levels(b"\3\2") + levels(b"\2\1") + b"abcdefgh", 2),
        (levels(b"\3\2") + levels(b"\4\1") + b"abcdefg", 2),
        (levels(b"\2\0") + levels(b"\2\0") + b"abcd", 1),
    ],
    ids=["two lists", "a null", "too few levels", "too few bytes", "bytes of an empty one"],
)
def test_what_is_not_one_list_is_unreadable(page: bytes, num_values: int) -> None:
    with pytest.raises(parquet.Unreadable):
        parquet.read_list(page, num_values, 4)


def test_integers_are_zigzag_and_end() -> None:
    assert [thrift.integer(bytes([n]), 0)[0] for n in range(5)] == [0, -1, 1, -2, 2]
    assert thrift.integer(b"\xff" * 9 + b"\x01", 0) == (-(2**63), 10)
    with pytest.raises(thrift.Malformed):
        thrift.integer(b"\xff" * 11, 0)


def test_what_nests_without_end_is_malformed() -> None:
    with pytest.raises(thrift.Malformed, match="deep"):
        thrift.struct(b"\x1c" * 1000, 0)
    with pytest.raises(thrift.Malformed, match="deep"):
        thrift.struct(b"\x19" * 1000, 0)


def test_what_has_fields_without_end_is_malformed() -> None:
    with pytest.raises(thrift.Malformed, match="number 1001"):
        thrift.struct(b"\x15\x00" * 2000, 0)


def test_a_footer_larger_than_any_is_not_even_read() -> None:
    with pytest.raises(parquet.Unreadable, match="at most"):
        parquet.read_footer(bytes(parquet.MOST_FOOTER + 1))


def test_a_list_that_claims_more_than_there_is_is_refused_at_once() -> None:
    with pytest.raises(IndexError):
        thrift.sequence(b"\xf5" + b"\xff" * 8 + b"\x01", 0, thrift.integer)
