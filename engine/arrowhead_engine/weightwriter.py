# SPDX-License-Identifier: Apache-2.0
"""`write` makes a weight file (docs/format.md), by pyarrow; reading one imports none of this."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from arrowhead_engine.errors import BadDtype, BadShape, DuplicateTensor, SizeMismatch
from arrowhead_engine.weightfile import (
    ALIGNMENT,
    FORMAT_VERSION,
    ITEM_SIZE,
    MAGIC,
    MAX_TENSOR_BYTES,
    VERSION_KEY,
    Tensor,
    rows_scaled,
)

Compression = Literal["none", "lz4", "zstd"]

_SCHEMA = pa.schema(
    [
        pa.field("layer_name", pa.string(), nullable=False),
        pa.field(
            "shape", pa.list_(pa.field("element", pa.int32(), nullable=False)), nullable=False
        ),
        pa.field("dtype", pa.string(), nullable=False),
        pa.field("num_params", pa.int64(), nullable=False),
        pa.field("crc32", pa.uint32(), nullable=False),
        pa.field(
            "scales", pa.list_(pa.field("element", pa.float32(), nullable=False)), nullable=False
        ),
        pa.field("byte_planes", pa.bool_(), nullable=False),
        pa.field("padding", pa.binary(), nullable=False),
        pa.field("data", pa.binary(), nullable=False),
    ]
)


def write(
    path: str | os.PathLike[str],
    tensors: Iterable[Tensor],
    metadata: Mapping[str, str],
    compression: Compression = "none",
) -> None:
    """Writes a weight file, one tensor in memory at a time, and puts it in place whole.

    Args:
        path: the file to make or replace. Who has the old one mapped keeps the old bytes.
        tensors: in the order in which they shall lie in the file.
        metadata: further key-value metadata; the format version is added.
        compression: "none" makes the tensors mappable; "lz4" and "zstd" the file smaller to ship.

    Raises:
        DuplicateTensor, BadDtype, BadShape, SizeMismatch: the tensor named cannot be written.
    """
    path = Path(path)
    with (
        _replacing(path) as temporary,
        pa.OSFile(str(temporary), "wb") as sink,
        _writer(sink, compression) as writer,
    ):
        writer.add_key_value_metadata({**metadata, VERSION_KEY: str(FORMAT_VERSION)})
        seen: set[str] = set()
        for tensor in tensors:
            _check_writable(tensor, seen)
            if compression == "none":
                # Written once to the side to learn where `data` comes to lie: all that is before
                # it has a constant size for this tensor, whatever the length of the padding.
                distance = sink.tell() + _distance_to_data(tensor, ALIGNMENT)
                padding = ALIGNMENT + -distance % ALIGNMENT
                writer.write_table(_row(tensor, padding, byte_planes=False))
            else:
                # The exponents of neighbouring weights are alike, their mantissas are noise: apart,
                # the former compress (ZSTD on MiniLM's float16: 85 % in place of 92 %).
                planes = ITEM_SIZE[tensor.dtype] > 1
                writer.write_table(_row(tensor, 0, byte_planes=planes))


def _row(tensor: Tensor, padding: int, *, byte_planes: bool) -> pa.Table:
    values = [
        [tensor.name],
        [list(tensor.shape)],
        [tensor.dtype],
        [prod(tensor.shape)],
        [zlib.crc32(tensor.scales.tobytes(), zlib.crc32(tensor.data))],
        [tensor.scales],
        [byte_planes],
        [bytes(padding)],
    ]
    arrays = [pa.array(value, field.type) for value, field in zip(values, _SCHEMA, strict=False)]
    data = tensor.data
    if byte_planes:
        elements = np.frombuffer(data, np.uint8).reshape(-1, ITEM_SIZE[tensor.dtype])
        data = np.ascontiguousarray(elements.T).reshape(-1).data
    # The tensor's own memory becomes the array's, so that the only copy is the one into the file.
    ends = pa.array([0, len(data)], pa.int32()).buffers()[1]
    arrays.append(pa.Array.from_buffers(pa.binary(), 1, [None, ends, pa.py_buffer(data)]))
    return pa.Table.from_arrays(arrays, schema=_SCHEMA)


def _distance_to_data(tensor: Tensor, padding: int) -> int:
    """Bytes from the start of the tensor's row group to its first data byte."""
    scratch = pa.BufferOutputStream()
    with _writer(scratch, "none") as writer:
        writer.write_table(_row(tensor, padding, byte_planes=False))
    group = pq.read_metadata(pa.BufferReader(scratch.getvalue())).row_group(0)
    chunk = group.column(len(_SCHEMA) - 1)
    return int(chunk.data_page_offset + chunk.total_compressed_size - len(tensor.data) - len(MAGIC))


def _writer(sink: Any, compression: Compression) -> pq.ParquetWriter:
    # Only `data` is worth compressing. Statistics would put whole tensors into the footer.
    return pq.ParquetWriter(
        sink,
        _SCHEMA,
        compression={"data": compression} if compression != "none" else "none",
        use_dictionary=False,
        write_statistics=False,
        store_schema=False,
        data_page_version="1.0",
    )


def _check_writable(tensor: Tensor, seen: set[str]) -> None:
    if tensor.name in seen:
        raise DuplicateTensor(f"{tensor.name}: given twice")
    seen.add(tensor.name)
    if tensor.dtype not in ITEM_SIZE:
        raise BadDtype(f"{tensor.name}: dtype {tensor.dtype!r}; known are {', '.join(ITEM_SIZE)}")
    if any(size < 0 for size in tensor.shape):
        raise BadShape(f"{tensor.name}: shape {list(tensor.shape)} has a negative dimension")
    rows = rows_scaled(tensor.dtype, tensor.shape)
    if len(tensor.scales) != rows:
        raise BadShape(
            f"{tensor.name}: {len(tensor.scales)} scales given, {tensor.dtype} "
            f"{list(tensor.shape)} takes {rows}"
        )
    wanted = prod(tensor.shape) * ITEM_SIZE[tensor.dtype]
    if len(tensor.data) != wanted:
        raise SizeMismatch(
            f"{tensor.name}: {len(tensor.data)} bytes given, {tensor.dtype} {list(tensor.shape)} "
            f"takes {wanted}"
        )
    if wanted > MAX_TENSOR_BYTES:
        raise SizeMismatch(
            f"{tensor.name}: {wanted} bytes; Parquet holds at most {MAX_TENSOR_BYTES} in one value"
        )


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A hidden sibling to write to, renamed over `path` on success and removed on failure."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
