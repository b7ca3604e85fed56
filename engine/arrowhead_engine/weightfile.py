# SPDX-License-Identifier: Apache-2.0
"""The Parquet weight file: `write` makes one, `WeightFile.open` checks and maps one.

docs/format.md is the specification; this module is that page in code, with numpy and pyarrow only.

    with WeightFile.open("weights.parquet") as weights:
        weights.tensors["embeddings.word_embeddings.weight"].shape    # (30522, 384)
        weights.buffer("embeddings.word_embeddings.weight")           # memoryview into the map
"""

from __future__ import annotations

import hashlib
import mmap
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from arrowhead_engine.errors import (
    BadDtype,
    BadOffset,
    BadSchema,
    BadShape,
    ChecksumMismatch,
    DuplicateTensor,
    NotAWeightFile,
    SizeMismatch,
    TruncatedFile,
    UnsupportedVersion,
)

FORMAT_VERSION = 1
VERSION_KEY = "arrowhead.format_version"
ALIGNMENT = 64  # bytes: a cache line, and the widest vector register
ITEM_SIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "int8": 1}  # bytes
MAX_TENSOR_BYTES = 2**31 - 1024  # Parquet's page sizes are signed 32-bit integers, header included

Compression = Literal["none", "lz4", "zstd"]
Scales = npt.NDArray[np.float32]

_NO_SCALES: Scales = np.empty(0, np.float32)
_MAGIC = b"PAR1"
_MOST_DESCRIPTION = 64 * 1024  # bytes for a name, a shape, ...; else a small file could fill memory
_MOST_DIMENSIONS = 8
_PAGE_OVERHEAD = 1024  # bytes, generously: page header and length
# What pyarrow raises on damaged bytes, its own decoding of column names included.
_UNREADABLE = (pa.ArrowException, OSError, ValueError, OverflowError)
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
# Absent from files that were written before there were int8 tensors and byte planes.
_LATER = ("scales", "byte_planes")


class Tensor(NamedTuple):
    """A tensor to be written.

    Attributes:
        name, dtype, shape: as in `TensorInfo`.
        data: its dense row-major little-endian bytes.
        scales: float32 [rows], what each row of an int8 tensor is to be multiplied with; of others
            empty.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: memoryview | bytes
    scales: Scales = _NO_SCALES


@dataclass(frozen=True)
class TensorInfo:
    """One row of the file, checked.

    Attributes:
        name: unique in the file.
        dtype: a key of `ITEM_SIZE`.
        shape: outermost dimension first.
        nbytes: size of the tensor in bytes, uncompressed.
        crc32: of those bytes, and of the scales after them.
        byte_planes: whether all first bytes of its elements are stored before all second ones,
            and so on, which compresses better.
        offset: where they start in the file, a multiple of 64; None if they are compressed.
        stored_bytes: what the tensor takes in the file.
        row_group: its place in the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    crc32: int
    byte_planes: bool
    offset: int | None
    stored_bytes: int
    row_group: int

    @property
    def num_params(self) -> int:
        """Elements, the product of the shape."""
        return prod(self.shape)


class WeightFile:
    """An open, checked weight file whose uncompressed tensors are views of one memory map.

    The map is private and copy-on-write: pages are shared with every other process that maps the
    file, and nothing done to a view can reach the file. Views stay valid while any of them lives,
    also after `close`.
    """

    def __init__(self, path: Path, buffer: mmap.mmap, parquet: pq.ParquetFile) -> None:
        self.path = path
        self._map = buffer
        self._parquet = parquet
        self._sha256 = ""
        self.metadata = _check_version(path, parquet)
        self.tensors, self._scales = _check_tensors(path, buffer, parquet)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> WeightFile:
        """Maps the file and checks everything but the checksums (`verify` does those).

        Raises:
            FileNotFoundError: no such file.
            WeightFileError: one subclass a fault, see docs/format.md.
        """
        path = Path(path)
        with path.open("rb") as file:
            head, size = file.read(4), os.fstat(file.fileno()).st_size
            if size == 0:
                raise NotAWeightFile(f"{path}: the file is empty; convert the model again")
            if head != _MAGIC:
                raise NotAWeightFile(
                    f"{path}: not a Parquet file (begins with {head!r}, not {_MAGIC!r})"
                )
            # One map serves both the footer and the tensors, so a file renamed over this path in
            # between cannot mix with it. ACCESS_COPY: torch refuses read-only buffers.
            buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        if size < len(_MAGIC) * 2 + 4 or buffer[-4:] != _MAGIC:
            raise TruncatedFile(f"{path}: {size} bytes, and the end is missing; copy it again")
        try:
            return cls(path, buffer, pq.ParquetFile(pa.BufferReader(pa.py_buffer(buffer))))
        except _UNREADABLE as error:
            raise NotAWeightFile(f"{path}: its Parquet footer cannot be read: {error}") from error

    @property
    def mapped(self) -> bool:
        """Whether every tensor is a view of the map (no tensor is compressed)."""
        return all(tensor.offset is not None for tensor in self.tensors.values())

    @property
    def main_dtype(self) -> str:
        """How the largest tensor is stored, as all are but int8's vectors."""
        return max(self.tensors.values(), key=lambda tensor: tensor.nbytes).dtype

    @property
    def span(self) -> tuple[int, int]:
        """First and last+1 byte of all mapped tensors: what one copy to a device has to move."""
        mapped = [
            (t.offset, t.offset + t.nbytes) for t in self.tensors.values() if t.offset is not None
        ]
        return min((start for start, _ in mapped), default=0), max(
            (end for _, end in mapped), default=0
        )

    def map(self) -> memoryview:
        """The whole file, as mapped."""
        return memoryview(self._map)

    def buffer(self, name: str) -> memoryview:
        """The bytes of a tensor: a view of the map, or its decompressed bytes.

        Raises:
            KeyError: no tensor of that name.
            SizeMismatch: compressed bytes that do not decompress to shape x dtype.
        """
        tensor = self.tensors[name]
        if tensor.offset is not None:
            return memoryview(self._map)[tensor.offset : tensor.offset + tensor.nbytes]
        try:
            column = self._parquet.read_row_group(tensor.row_group, columns=["data"]).column("data")
        except _UNREADABLE as error:
            raise SizeMismatch(f"{self.path}: {name}: cannot be decompressed: {error}") from error
        if len(column) != 1:
            raise SizeMismatch(
                f"{self.path}: {name}: decompresses to {len(column)} values, not one"
            )
        stored = column[0].as_buffer()
        if stored.size != tensor.nbytes:
            raise SizeMismatch(
                f"{self.path}: {name}: decompresses to {stored.size} bytes, "
                f"{tensor.dtype} {list(tensor.shape)} takes {tensor.nbytes}"
            )
        if tensor.byte_planes:
            planes = np.frombuffer(stored, np.uint8).reshape(ITEM_SIZE[tensor.dtype], -1)
            return np.ascontiguousarray(planes.T).reshape(-1).data
        return memoryview(bytearray(stored))  # torch refuses read-only buffers

    def scales(self, name: str) -> Scales:
        """What to multiply each row of an int8 tensor with, float32 [rows]; of others empty."""
        return self._scales.get(name, _NO_SCALES)

    def stream(self) -> Iterator[Tensor]:
        """Every tensor in file order, as `write` takes them."""
        for info in self.tensors.values():
            yield Tensor(
                info.name, info.dtype, info.shape, self.buffer(info.name), self.scales(info.name)
            )

    def sha256(self) -> str:
        """The SHA-256 of all tensors' bytes and scales in file order, in hexadecimal.

        The first call reads all of them (1.5 GB/s where the processor helps).
        """
        if not self._sha256:
            digest = hashlib.sha256()
            for name in self.tensors:
                digest.update(self.buffer(name))
                digest.update(self.scales(name).tobytes())
            self._sha256 = digest.hexdigest()
        return self._sha256

    def verify(self) -> None:
        """Reads every tensor and compares its checksum (about 1 GB/s).

        Raises:
            ChecksumMismatch: the first tensor whose bytes are not those that were written.
        """
        for name, tensor in self.tensors.items():
            data, scales = self.buffer(name), self.scales(name).tobytes()
            met = zlib.crc32(scales, zlib.crc32(data))
            if met != tensor.crc32:
                raise ChecksumMismatch(
                    f"{self.path}: {name}: its bytes have CRC-32 {met:08x}, {tensor.crc32:08x} was "
                    "written; the file was changed or damaged, convert the model again"
                )

    def release(self) -> None:
        """Gives the pages that were read back to the system; what is touched again comes back.

        Whatever was written into views is lost: nothing of this package does.
        """
        self._map.madvise(mmap.MADV_DONTNEED)

    def __enter__(self) -> WeightFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Drops this object's hold on the map; views that are still alive keep it open."""
        self._parquet.close()


def _check_version(path: Path, parquet: pq.ParquetFile) -> dict[str, str]:
    raw = parquet.metadata.metadata or {}
    metadata = {
        key.decode("utf-8", "replace"): value.decode("utf-8", "replace")
        for key, value in raw.items()
    }
    version = metadata.get(VERSION_KEY)
    if version is None:
        raise NotAWeightFile(f"{path}: a Parquet file, but without {VERSION_KEY} in its metadata")
    if version != str(FORMAT_VERSION):
        raise UnsupportedVersion(
            f"{path}: format version {version!r}, this Arrowhead reads {FORMAT_VERSION}; "
            "upgrade Arrowhead or convert the model again"
        )
    return metadata


def _check_tensors(
    path: Path, buffer: mmap.mmap, parquet: pq.ParquetFile
) -> tuple[dict[str, TensorInfo], dict[str, Scales]]:
    """Every row checked, in file order; nothing of a tensor's data is read but its length."""
    columns = _check_schema(path, parquet)
    footer_length = int.from_bytes(buffer[-8:-4], "little")
    data_end = len(buffer) - 8 - footer_length
    tensors: dict[str, TensorInfo] = {}
    scales: dict[str, Scales] = {}
    for row_group, (name, shape, dtype, num_params, crc32, planes) in enumerate(
        _rows(parquet, columns)
    ):
        where = f"{path}: {name}"
        if name in tensors:
            raise DuplicateTensor(f"{where}: stands twice in the file")
        if dtype not in ITEM_SIZE:
            raise BadDtype(f"{where}: dtype {dtype!r}; known are {', '.join(ITEM_SIZE)}")
        if any(size < 0 for size in shape) or prod(shape) != num_params:
            raise BadShape(
                f"{where}: shape {list(shape)} does not hold num_params = {num_params} elements"
            )
        nbytes = num_params * ITEM_SIZE[dtype]
        if dtype == "int8":
            scales[name] = _read_scales(where, shape, parquet, row_group, columns)
        chunk = parquet.metadata.row_group(row_group).column(columns["data"])
        offset = None
        if planes and _is_plain(chunk):
            raise BadSchema(f"{where}: byte planes that are not compressed cannot be mapped")
        if _is_plain(chunk):
            offset = _locate(where, buffer, chunk, nbytes, data_end)
        elif not nbytes <= chunk.total_uncompressed_size <= nbytes + _PAGE_OVERHEAD:
            raise SizeMismatch(
                f"{where}: {chunk.total_uncompressed_size} bytes uncompressed, shape x dtype takes "
                f"{nbytes}"
            )
        tensors[name] = TensorInfo(
            name,
            dtype,
            shape,
            nbytes,
            crc32,
            planes,
            offset,
            chunk.total_compressed_size,
            row_group,
        )
    _check_overlap(path, tensors)
    return tensors, scales


def _read_scales(
    where: str,
    shape: tuple[int, ...],
    parquet: pq.ParquetFile,
    row_group: int,
    columns: dict[str, int],
) -> Scales:
    rows = _rows_scaled("int8", shape)
    wanted = f"{where}: int8 {list(shape)} wants {rows} finite scales"
    if "scales" not in columns:
        raise BadSchema(f"{wanted}; the file has no column 'scales'")
    # Its declared size first, or a small file could fill memory.
    chunk = parquet.metadata.row_group(row_group).column(columns["scales"])
    if chunk.total_uncompressed_size > 8 * rows + _PAGE_OVERHEAD or chunk.num_values > max(rows, 1):
        raise BadShape(f"{wanted}, met {chunk.num_values} in {chunk.total_uncompressed_size} bytes")
    column = parquet.read_row_group(row_group, columns=["scales"]).column("scales")
    values: Scales = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    if len(values) != rows or not np.isfinite(values).all():
        raise BadShape(f"{wanted}, met {len(values)}")
    return values


def _check_schema(path: Path, parquet: pq.ParquetFile) -> dict[str, int]:
    """The position of each top-level column among the file's leaf columns."""
    schema = parquet.schema_arrow
    for field in _SCHEMA:
        index = schema.get_field_index(field.name)
        if index < 0 and field.name in _LATER and field.name not in schema.names:
            continue
        if index < 0:
            raise BadSchema(f"{path}: has no column {field.name!r} (or has it twice)")
        met = schema.field(index)
        if met.type != field.type or met.nullable:
            nullable = " and nullable" if met.nullable else ""
            raise BadSchema(
                f"{path}: column {field.name!r} is {met.type}{nullable}, "
                f"wanted {field.type} and not nullable"
            )
    leaves = [parquet.schema.column(i).path.split(".")[0] for i in range(len(parquet.schema))]
    columns = {name: leaves.index(name) for name in leaves}
    for index in range(parquet.metadata.num_row_groups):
        group = parquet.metadata.row_group(index)
        if group.num_rows != 1:
            raise BadSchema(
                f"{path}: row group {index} has {group.num_rows} rows, each must hold one tensor"
            )
        for name, column in columns.items():
            chunk = group.column(column)
            if name not in ("data", "scales") and chunk.total_uncompressed_size > _MOST_DESCRIPTION:
                raise BadSchema(
                    f"{path}: row group {index}: {name} takes more than the "
                    f"{_MOST_DESCRIPTION} bytes that describe a tensor"
                )
            # A dictionary may stand for any number of values in a few bytes.
            most = {"shape": _MOST_DIMENSIONS, "scales": 2**31}.get(name, 1)
            if chunk.num_values > most:
                raise BadSchema(
                    f"{path}: row group {index}: {name} holds {chunk.num_values} values, {most} at "
                    "most"
                )
    return columns


def _rows(
    parquet: pq.ParquetFile, columns: dict[str, int]
) -> Iterator[tuple[str, tuple[int, ...], str, int, int, bool]]:
    names = ["layer_name", "shape", "dtype", "num_params", "crc32"]
    table = parquet.read(columns=[*names, *({"byte_planes"} & columns.keys())])
    values = [table.column(name).to_pylist() for name in names]
    planes = table.column("byte_planes").to_pylist() if "byte_planes" in columns else None
    for name, shape, *rest, split in zip(*values, planes or [False] * table.num_rows, strict=True):
        yield name, tuple(shape), *rest, split


def _rows_scaled(dtype: str, shape: tuple[int, ...]) -> int:
    """How many scales a tensor has: one a row of int8, none where there are no elements."""
    return shape[0] if dtype == "int8" and shape and 0 not in shape else 0


def _is_plain(chunk: Any) -> bool:
    return (
        chunk.compression == "UNCOMPRESSED"
        and not chunk.has_dictionary_page
        and set(chunk.encodings) <= {"PLAIN", "RLE"}
    )


def _locate(where: str, buffer: mmap.mmap, chunk: Any, nbytes: int, data_end: int) -> int:
    """Where a plain tensor's bytes start, proved by the length that Parquet writes before them."""
    end = chunk.data_page_offset + chunk.total_compressed_size
    start = end - nbytes
    if chunk.data_page_offset < len(_MAGIC) or chunk.total_compressed_size < 0 or end > data_end:
        raise BadOffset(
            f"{where}: its data is said to lie at bytes {chunk.data_page_offset}-{end}, outside "
            f"the file's data (bytes {len(_MAGIC)}-{data_end})"
        )
    length = int.from_bytes(buffer[max(start - 4, 0) : max(start, 0)], "little")
    if start - 4 <= chunk.data_page_offset or length != nbytes:
        raise SizeMismatch(
            f"{where}: shape x dtype takes {nbytes} bytes, the file does not hold that many for it "
            f"({chunk.total_compressed_size} with their page header)"
        )
    if start % ALIGNMENT:
        raise BadOffset(f"{where}: its data starts at byte {start}, not a multiple of {ALIGNMENT}")
    return int(start)


def _check_overlap(path: Path, tensors: Mapping[str, TensorInfo]) -> None:
    reached, before = 0, ""
    for tensor in sorted(tensors.values(), key=lambda t: t.offset or 0):
        if tensor.offset is None:
            continue
        if tensor.offset < reached:
            raise BadOffset(f"{path}: {tensor.name}: its data overlaps that of {before}")
        reached, before = tensor.offset + tensor.nbytes, tensor.name


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
    return int(
        chunk.data_page_offset + chunk.total_compressed_size - len(tensor.data) - len(_MAGIC)
    )


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
    rows = _rows_scaled(tensor.dtype, tensor.shape)
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
