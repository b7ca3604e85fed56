# SPDX-License-Identifier: Apache-2.0
"""Files that are not what they claim: each gives its named error, whatever its bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from arrowhead_engine import errors
from arrowhead_engine.weightfile import Tensor, WeightFile
from arrowhead_engine.weightwriter import Compression, write

SHAPE = pa.list_(pa.field("element", pa.int32(), nullable=False))
TYPES: dict[str, Any] = {
    "layer_name": pa.string(),
    "shape": SHAPE,
    "dtype": pa.string(),
    "num_params": pa.int64(),
    "crc32": pa.uint32(),
    "padding": pa.binary(),
    "data": pa.binary(),
}


def sound(path: Path, compression: Compression = "none") -> bytes:
    """Three tensors of equal size; their bytes differ."""
    tensors = [Tensor(f"t{i}", "float16", (8, 16), bytes([i + 1]) * 256) for i in range(3)]
    write(path, tensors, {}, compression)
    return path.read_bytes()


def parquet(
    path: Path,
    rows: list[dict[str, Any]],
    *,
    version: str | None = "1",
    types: dict[str, Any] = TYPES,
    nullable: bool = False,
    row_group_size: int = 1,
) -> None:
    """A Parquet file with these rows, otherwise written as a weight file is."""
    schema = pa.schema([pa.field(name, kind, nullable=nullable) for name, kind in types.items()])
    table = pa.Table.from_pylist(rows, schema)
    options = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    with pq.ParquetWriter(path, schema, store_schema=False, **options) as writer:
        if version is not None:
            writer.add_key_value_metadata({"arrowhead.format_version": version})
        writer.write_table(table, row_group_size=row_group_size)


SCALES = pa.list_(pa.field("element", pa.float32(), nullable=False))
QUANTISED = {**TYPES, "scales": SCALES, "byte_planes": pa.bool_()}


def row(**changes: Any) -> dict[str, Any]:
    fine = {
        "layer_name": "t",
        "shape": [2, 2],
        "dtype": "float16",
        "num_params": 4,
        "crc32": 0,
        "padding": b"",
        "data": b"12345678",
    }
    return {**fine, **changes}


def varint(value: int) -> bytes:
    """Thrift's compact form of a signed integer, as in Parquet's footer."""
    value <<= 1
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def move_data(raw: bytes, row_group: int, to: int) -> bytes:
    """The file with the footer's data_page_offset of a tensor's data changed to `to`."""
    chunk = pq.read_metadata(pa.BufferReader(raw)).row_group(row_group).column(8)
    met, new = varint(chunk.data_page_offset), varint(to)
    assert len(met) == len(new), "the new offset must take as many bytes as the old one"
    footer = len(raw) - 8 - int.from_bytes(raw[-8:-4], "little")
    assert met in raw[footer:]
    return raw[:footer] + raw[footer:].replace(met, new)


def data_offset(raw: bytes, row_group: int) -> int:
    offset: int = (
        pq.read_metadata(pa.BufferReader(raw)).row_group(row_group).column(8).data_page_offset
    )
    return offset


def endless_name(path: Path) -> None:
    tensors = [Tensor("n" * 100_000, "float16", (4,), b"12345678")]
    write(path, tensors, {})


def zero_bytes(path: Path) -> None:
    path.write_bytes(b"")


def not_parquet(path: Path) -> None:
    path.write_bytes(b"a pickle, perhaps" * 10)


def no_footer(path: Path) -> None:
    path.write_bytes(b"PAR1" + b"\xff" * 100 + b"PAR1")


def other_parquet(path: Path) -> None:
    pq.write_table(pa.table({"x": [1, 2, 3]}), path)


def no_version(path: Path) -> None:
    parquet(path, [row()], version=None)


def truncated(path: Path) -> None:
    path.write_bytes(sound(path)[:-100])


def only_the_magic(path: Path) -> None:
    path.write_bytes(b"PAR1")


def future_version(path: Path) -> None:
    parquet(path, [row()], version="2")


def missing_column(path: Path) -> None:
    parquet(path, [row()], types={k: v for k, v in TYPES.items() if k != "num_params"})


def column_of_another_type(path: Path) -> None:
    parquet(path, [row()], types={**TYPES, "num_params": pa.int32()})


def nullable_column(path: Path) -> None:
    parquet(path, [row()], nullable=True)


def two_rows_in_a_group(path: Path) -> None:
    parquet(path, [row(), row(layer_name="u")], row_group_size=2)


def duplicate_name(path: Path) -> None:
    raw = sound(path)
    second, first = b"\2\0\0\0t1", b"\2\0\0\0t0"
    assert raw.count(second) == 1
    path.write_bytes(raw.replace(second, first))


def wrong_dtype(path: Path) -> None:
    parquet(path, [row(dtype="float17")])


def negative_shape(path: Path) -> None:
    parquet(path, [row(shape=[-2, -2])])


def wrong_num_params(path: Path) -> None:
    parquet(path, [row(num_params=5)])


def shape_larger_than_data(path: Path) -> None:
    parquet(path, [row(shape=[2, 3], num_params=6)])


def shape_smaller_than_data(path: Path) -> None:
    parquet(path, [row(shape=[2], num_params=2)])


def unaligned(path: Path) -> None:
    parquet(path, [row(padding=b"0" * padding, layer_name=f"t{padding}") for padding in (64, 65)])


def offset_out_of_range(path: Path) -> None:
    raw = sound(path)
    path.write_bytes(move_data(raw, 1, len(raw) + 1000))


def offset_in_the_footer(path: Path) -> None:
    raw = sound(path)
    path.write_bytes(move_data(raw, 1, len(raw) - 200))


def overlapping(path: Path) -> None:
    raw = sound(path)
    path.write_bytes(move_data(raw, 1, data_offset(raw, 2)))


def one_bit_flipped(path: Path) -> None:
    raw = bytearray(sound(path))
    raw[raw.index(b"\x02" * 256) + 100] ^= 0x10
    path.write_bytes(bytes(raw))


def quantised(path: Path, scales: list[float], **changes: Any) -> None:
    fine = {"dtype": "int8", "data": b"1234", "scales": scales, "byte_planes": False}
    parquet(path, [row(**{**fine, **changes})], types=QUANTISED)


def int8_without_scales(path: Path) -> None:
    parquet(path, [row(dtype="int8", data=b"1234")])


def too_few_scales(path: Path) -> None:
    quantised(path, [1.0])


def too_many_scales(path: Path) -> None:
    quantised(path, [1.0] * 100_000)


def a_dictionary_of_scales(path: Path) -> None:
    """Millions of equal values take a few bytes, until they are read."""
    types = pa.schema([pa.field(n, k, nullable=False) for n, k in QUANTISED.items()])
    fine = row(dtype="int8", data=b"1234", byte_planes=False, scales=[1.0] * 3_000_000)
    options: dict[str, Any] = {"compression": "none", "use_dictionary": ["scales.list.element"]}
    with pq.ParquetWriter(path, types, store_schema=False, **options) as writer:
        writer.add_key_value_metadata({"arrowhead.format_version": "1"})
        writer.write_table(pa.Table.from_pylist([fine], types))
    assert path.stat().st_size < 10_000


def endless_dimensions(path: Path) -> None:
    quantised(path, [], shape=[1] * 9, dtype="float16", data=b"12", num_params=1)


def scales_that_are_none(path: Path) -> None:
    quantised(path, [1.0, float("nan")])


def a_changed_scale(path: Path) -> None:
    write(path, [Tensor("t", "int8", (2, 2), b"1234", np.array([1.5, 2.5], np.float32))], {})
    raw = path.read_bytes()
    stored = np.array([1.5, 2.5], np.float32).tobytes()
    assert raw.count(stored) == 1
    path.write_bytes(raw.replace(stored, np.array([1.5, 2.25], np.float32).tobytes()))


def planes_that_are_not_compressed(path: Path) -> None:
    quantised(path, [], dtype="float16", data=b"12345678", byte_planes=True)


def broken_compression(path: Path) -> None:
    tensors = [Tensor("t", "float16", (512,), np.arange(512, dtype=np.float16).tobytes())]
    write(path, tensors, {}, "zstd")
    raw = bytearray(path.read_bytes())
    start = bytes(raw).index(b"\x28\xb5\x2f\xfd")  # zstd's magic number
    raw[start : start + 4] = b"\0\0\0\0"
    path.write_bytes(bytes(raw))


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (zero_bytes, errors.NotAWeightFile),
        (not_parquet, errors.NotAWeightFile),
        (no_footer, errors.NotAWeightFile),
        (other_parquet, errors.NotAWeightFile),
        (no_version, errors.NotAWeightFile),
        (truncated, errors.TruncatedFile),
        (only_the_magic, errors.TruncatedFile),
        (future_version, errors.UnsupportedVersion),
        (missing_column, errors.BadSchema),
        (column_of_another_type, errors.BadSchema),
        (nullable_column, errors.BadSchema),
        (two_rows_in_a_group, errors.BadSchema),
        (endless_name, errors.BadSchema),
        (duplicate_name, errors.DuplicateTensor),
        (wrong_dtype, errors.BadDtype),
        (negative_shape, errors.BadShape),
        (wrong_num_params, errors.BadShape),
        (shape_larger_than_data, errors.SizeMismatch),
        (shape_smaller_than_data, errors.SizeMismatch),
        (unaligned, errors.BadOffset),
        (offset_out_of_range, errors.BadOffset),
        (offset_in_the_footer, errors.BadOffset),
        (overlapping, errors.BadOffset),
        (one_bit_flipped, errors.ChecksumMismatch),
        (broken_compression, errors.SizeMismatch),
        (int8_without_scales, errors.BadSchema),
        (too_few_scales, errors.BadShape),
        (too_many_scales, errors.BadShape),
        (scales_that_are_none, errors.BadShape),
        (a_dictionary_of_scales, errors.BadShape),
        (endless_dimensions, errors.BadSchema),
        (a_changed_scale, errors.ChecksumMismatch),
        (planes_that_are_not_compressed, errors.BadSchema),
    ],
    ids=lambda value: value.__name__,
)
def test_each_fault_has_its_error(
    tmp_path: Path, make: Callable[[Path], None], error: type[errors.WeightFileError]
) -> None:
    path = tmp_path / "weights.parquet"
    make(path)
    with pytest.raises(error) as caught:
        WeightFile.open(path).verify()
    assert type(caught.value) is error
    assert str(path) in str(caught.value)


def test_every_weight_file_error_is_provoked_above() -> None:
    marks = test_each_fault_has_its_error.pytestmark  # type: ignore[attr-defined]
    provoked = {error for _, error in marks[0].args[1]}
    assert provoked == set(errors.WeightFileError.__subclasses__())


def test_a_missing_file_is_a_file_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        WeightFile.open(tmp_path / "weights.parquet")


@settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    edits=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=4),
    tail=st.booleans(),
    cut=st.integers(0, 20),
    compression=st.sampled_from(["none", "zstd", "lz4"]),
)
@example(edits=[(1.0, 0)], tail=True, cut=0, compression="none")
def test_damaged_bytes_never_give_anything_but_a_named_error(
    tmp_path: Path,
    edits: list[tuple[float, int]],
    tail: bool,
    cut: int,
    compression: Compression,
) -> None:
    """Bytes overwritten anywhere (or only in the footer, where the offsets are), some cut out."""
    path = tmp_path / "weights.parquet"
    raw = bytearray(sound(path, compression))
    first = len(raw) - 8 - int.from_bytes(raw[-8:-4], "little") if tail else 0
    for place, value in edits:
        raw[first + int(place * (len(raw) - 1 - first))] = value
    del raw[len(raw) // 2 : len(raw) // 2 + cut]
    path.write_bytes(bytes(raw))
    try:
        weights = WeightFile.open(path)
        weights.verify()
    except errors.WeightFileError as error:
        assert len(str(error).splitlines()) == 1  # noqa: PT017
        assert len(str(error)) <= 1000  # noqa: PT017
        return
    # Accepted, so what was damaged does not matter: every tensor is one that was written.
    for info in weights.tensors.values():
        assert bytes(weights.buffer(info.name)) in [bytes([i + 1]) * 256 for i in range(3)]


def headers(raw: bytes) -> list[int]:
    """The places of all bytes that describe: the footer, and before the data of each page."""
    footer = len(raw) - 8 - int.from_bytes(raw[-8:-4], "little")
    places = [*range(footer, len(raw) - 4)]
    metadata = pq.read_metadata(pa.BufferReader(raw))
    for number in range(metadata.num_row_groups):
        for column in range(metadata.num_columns):
            chunk = metadata.row_group(number).column(column)
            size = min(chunk.total_compressed_size, 60)
            places += range(chunk.data_page_offset, chunk.data_page_offset + size)
    return places


def open_all(path: Path) -> None:
    """Opens a file whose checksums nobody compares; whatever is given out lies within it."""
    try:
        weights = WeightFile.open(path)
        for name, info in weights.tensors.items():
            if info.offset is not None:
                assert 4 < info.offset <= info.offset + info.nbytes <= path.stat().st_size - 8
                assert info.offset % 64 == 0
            assert weights.buffer(name).nbytes == info.nbytes
            assert weights.float32(name).shape == info.shape
    except errors.WeightFileError as error:
        assert 0 < len(str(error)) <= 1000  # noqa: PT017


@settings(max_examples=500, deadline=None)
@given(data=st.data(), kind=st.sampled_from(["none", "zstd", "lz4", "int8"]))
def test_damaged_headers_never_give_anything_but_a_named_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, kind: str
) -> None:
    """Bytes changed, taken away, doubled: in the footer, whose length is put right, or a page's."""
    path = tmp_path_factory.mktemp("headers") / "weights.parquet"
    if kind == "int8":
        scales = np.arange(8, dtype=np.float32)
        tensors = [Tensor(f"t{i}", "int8", (8, 32), bytes([i]) * 256, scales) for i in range(3)]
        write(path, tensors, {})
        raw = bytearray(path.read_bytes())
    else:
        raw = bytearray(sound(path, kind))  # type: ignore[arg-type]
    footer = len(raw) - 8 - int.from_bytes(raw[-8:-4], "little")
    places = st.sampled_from(headers(bytes(raw)))
    for place, value in data.draw(st.lists(st.tuples(places, st.integers(0, 255)), max_size=4)):
        raw[place] = value
    end = len(raw) - 8
    at, size = data.draw(st.integers(footer, end)), data.draw(st.integers(0, 40))
    part = raw[at : min(at + size, end)]
    raw[at : at + len(part)] = part * data.draw(st.sampled_from([0, 1, 1, 2, 50]))
    raw[-8:-4] = (len(raw) - 8 - footer).to_bytes(4, "little")
    path.write_bytes(bytes(raw))
    open_all(path)


@pytest.mark.parametrize(
    "options",
    [
        {"use_dictionary": True, "compression": "none"},
        {"use_dictionary": True},
        {"use_dictionary": False, "compression": "snappy"},
        {"use_dictionary": False, "compression": "zstd"},
        {"use_dictionary": False, "compression": {"data": "gzip"}},
        {"use_dictionary": False, "compression": "none", "data_page_version": "2.0"},
    ],
    ids=str,
)
def test_what_other_writers_made_of_it_is_refused_with_what_to_do(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    path = tmp_path / "weights.parquet"
    sound(path)
    table = pq.read_table(path)
    with pq.ParquetWriter(path, table.schema, store_schema=False, **options) as writer:
        writer.add_key_value_metadata({"arrowhead.format_version": "1"})
        writer.write_table(table, row_group_size=1)
    with pytest.raises(errors.BadSchema, match="not as Arrowhead writes it; convert the model"):
        WeightFile.open(path)
