# SPDX-License-Identifier: Apache-2.0
"""The Parquet weight file: `WeightFile.open` checks and maps one; weightwriter.py makes it.

docs/format.md is the specification; this module is that page in code. What is Parquet's is read by
parquet.py, so that nobody who serves a model pays for a Parquet library.

    with WeightFile.open("weights.parquet") as weights:
        weights.tensors["embeddings.word_embeddings.weight"].shape    # (30522, 384)
        weights.buffer("embeddings.word_embeddings.weight")           # memoryview into the map
"""

from __future__ import annotations

import hashlib
import mmap
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from arrowhead_engine import parquet
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
MAGIC = b"PAR1"  # at both ends
ALIGNMENT = 64  # bytes: a cache line, and the widest vector register
ITEM_SIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "int8": 1}  # bytes
MAX_TENSOR_BYTES = 2**31 - 1024  # Parquet's page sizes are signed 32-bit integers, header included

T = TypeVar("T")
Floats = npt.NDArray[np.float32]
Scales = npt.NDArray[np.float32]

_NO_SCALES: Scales = np.empty(0, np.float32)
_NUMPY = {"float16": np.float16, "bfloat16": np.uint16, "float32": np.float32, "int8": np.int8}
_MOST_DIMENSIONS = 8
_LENGTH = 4  # bytes before a value: how many those are
_AFTER_FOOTER = 8  # bytes: its length, and the magic
_MOST_DESCRIPTION = 64 * 1024  # bytes for a name, a shape, ...; else a small file could fill memory
_PAGE_OVERHEAD = 1024  # bytes, generously: page header and length
_CODECS = {parquet.ZSTD: "zstd", parquet.LZ4_RAW: "lz4_raw"}  # by pyarrow's names
_COLUMNS = {
    "layer_name": "required binary (UTF8)",
    "shape": "required group (LIST) { repeated group { required int32 } }",
    "dtype": "required binary (UTF8)",
    "num_params": "required int64",
    "crc32": "required int32 (UINT_32)",
    "scales": "required group (LIST) { repeated group { required float } }",
    "byte_planes": "required boolean",
    "padding": "required binary",
    "data": "required binary",
}
_REWRITTEN = "not as Arrowhead writes it; convert the model again"
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
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    crc32: int
    byte_planes: bool
    offset: int | None
    stored_bytes: int

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

    def __init__(self, path: Path, buffer: mmap.mmap) -> None:
        self.path = path
        self._map = buffer
        self._sha256 = ""
        footer = _read_footer(path, buffer)
        self.metadata = _check_version(path, footer)
        self.tensors, self._scales, self._compressed = _check_tensors(path, buffer, footer)

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
            if head != MAGIC:
                raise NotAWeightFile(
                    f"{path}: not a Parquet file (begins with {head!r}, not {MAGIC!r})"
                )
            # One map serves both the footer and the tensors, so a file renamed over this path in
            # between cannot mix with it. ACCESS_COPY: torch refuses read-only buffers.
            buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        if size < len(MAGIC) * 2 + 4 or buffer[-4:] != MAGIC:
            raise TruncatedFile(f"{path}: {size} bytes, and the end is missing; copy it again")
        return cls(path, buffer)

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
            ChecksumMismatch: nor to what was written.
        """
        tensor = self.tensors[name]
        if tensor.offset is not None:
            return memoryview(self._map)[tensor.offset : tensor.offset + tensor.nbytes]
        stored = _decompressed(self._where(name), self._map, self._compressed[name], tensor.nbytes)
        planes = ITEM_SIZE[tensor.dtype] if tensor.byte_planes else 1
        # Always a copy: torch refuses read-only buffers.
        data = stored.reshape(planes, -1).T.flatten().data
        # LZ4 does not tell that it ended early, and leaves what the memory held before.
        self._check_crc32(tensor, data)
        return data

    def stored(self, name: str) -> npt.NDArray[Any]:
        """A tensor as it lies in the file, of its shape; of bfloat16 the bits, as uint16."""
        info = self.tensors[name]
        return np.frombuffer(self.buffer(name), _NUMPY[info.dtype]).reshape(info.shape)

    def float32(self, name: str) -> Floats:
        """A tensor as float32, of its shape; int8 rows multiplied with their scales."""
        info, raw = self.tensors[name], self.stored(name)
        if info.dtype == "bfloat16":
            return (raw.astype(np.uint32) << 16).view(np.float32)
        if info.dtype == "int8":
            scales = self.scales(name).reshape(-1, *[1] * (raw.ndim - 1))
            return raw.astype(np.float32) * scales
        return np.ascontiguousarray(raw, np.float32)

    def scales(self, name: str) -> Scales:
        """What to multiply each row of an int8 tensor with, float32 [rows]; of others empty."""
        return self._scales.get(name, _NO_SCALES)

    def stream(self) -> Iterator[Tensor]:
        """Every tensor in file order, as `weightwriter.write` takes them."""
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
            self._check_crc32(tensor, self.buffer(name))

    def _check_crc32(self, tensor: TensorInfo, data: memoryview) -> None:
        met = zlib.crc32(self.scales(tensor.name).tobytes(), zlib.crc32(data))
        if met != tensor.crc32:
            raise ChecksumMismatch(
                f"{self._where(tensor.name)}: its bytes have CRC-32 {met:08x}, {tensor.crc32:08x} "
                "was written; the file was changed or damaged, convert the model again"
            )

    def _where(self, name: str) -> str:
        return f"{self.path}: {name}"

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
        """Closes the map, unless views of it are alive: they keep it open."""
        with suppress(BufferError):
            self._map.close()


def _read_footer(path: Path, buffer: mmap.mmap) -> parquet.Footer:
    end, length = len(buffer) - _AFTER_FOOTER, _footer_length(buffer)
    try:
        if length > min(end - len(MAGIC), parquet.MOST_FOOTER):
            raise parquet.Unreadable(f"it is said to take {length} bytes")
        return parquet.read_footer(buffer[end - length : end])
    except parquet.Unreadable as error:
        raise NotAWeightFile(
            f"{path}: its Parquet footer cannot be read: {error}; convert the model again"
        ) from error


def _footer_length(buffer: mmap.mmap) -> int:
    return int.from_bytes(buffer[-_AFTER_FOOTER : -len(MAGIC)], "little")


def _check_version(path: Path, footer: parquet.Footer) -> dict[str, str]:
    version = footer.metadata.get(VERSION_KEY)
    if version is None:
        raise NotAWeightFile(f"{path}: a Parquet file, but without {VERSION_KEY} in its metadata")
    if version != str(FORMAT_VERSION):
        raise UnsupportedVersion(
            f"{path}: format version {version!r}, this Arrowhead reads {FORMAT_VERSION}; upgrade "
            "Arrowhead, or convert the model again with this one"
        )
    return footer.metadata


def _check_tensors(
    path: Path, buffer: mmap.mmap, footer: parquet.Footer
) -> tuple[dict[str, TensorInfo], dict[str, Scales], dict[str, parquet.Chunk]]:
    """Every row checked, in file order; nothing of a tensor's data is read but its length.

    Returns: the tensors, the scales of those of int8, where the compressed ones lie.
    """
    columns = _check_schema(path, footer)
    rows = _Descriptions(path, buffer, columns)
    tensors: dict[str, TensorInfo] = {}
    scales: dict[str, Scales] = {}
    compressed: dict[str, parquet.Chunk] = {}
    for number, (_, chunks) in enumerate(footer.row_groups):
        name, shape, dtype, num_params, crc32, planes = rows.row(number, chunks)
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
            scales[name] = _read_scales(where, shape, rows, chunks)
        chunk = chunks[columns["data"]]
        _check_within(where, "data", chunk, rows.data_end)
        if not chunk.plain or chunk.num_values != 1:
            raise BadSchema(f"{where}: its data is not one PLAIN value; {_REWRITTEN}")
        offset = None
        if chunk.codec != parquet.UNCOMPRESSED:
            _check_compressed(where, chunk, nbytes)
            compressed[name] = chunk
        elif planes:
            raise BadSchema(f"{where}: byte planes that are not compressed cannot be mapped")
        else:
            offset = _locate(where, buffer, chunk, nbytes)
        tensors[name] = TensorInfo(
            name, dtype, shape, nbytes, crc32, planes, offset, chunk.stored_bytes
        )
    _check_overlap(path, tensors)
    return tensors, scales, compressed


def _check_schema(path: Path, footer: parquet.Footer) -> dict[str, int]:
    """The position of each column of the format among the file's leaf columns."""
    names = [column.name for column in footer.columns]
    columns: dict[str, int] = {}
    for name, wanted in _COLUMNS.items():
        if name in _LATER and name not in names:
            continue
        if names.count(name) != 1:
            raise BadSchema(f"{path}: has no column {name!r} (or has it twice)")
        column = footer.columns[names.index(name)]
        if column.type != wanted:
            raise BadSchema(f"{path}: column {name!r} is {column.type!r}, wanted {wanted!r}")
        columns[name] = column.leaf
    for number, (num_rows, _) in enumerate(footer.row_groups):
        if num_rows != 1:
            raise BadSchema(
                f"{path}: row group {number} has {num_rows} rows, each must hold one tensor"
            )
    return columns


class _Descriptions:
    """Reads the columns that describe a tensor.

    Attributes:
        columns: the position of each column of the format among the leaf columns.
        data_end: where the footer starts.
    """

    def __init__(self, path: Path, buffer: mmap.mmap, columns: Mapping[str, int]) -> None:
        self.columns = columns
        self.data_end = len(buffer) - _AFTER_FOOTER - _footer_length(buffer)
        self._path = path
        self._buffer = buffer
        self._pages = {name: parquet.Pages() for name in columns}

    def row(
        self, number: int, chunks: list[parquet.Chunk]
    ) -> tuple[str, tuple[int, ...], str, int, int, bool]:
        """Name, shape, dtype, num_params, crc32 and byte_planes of a row group's tensor."""
        where = f"{self._path}: row group {number}"
        return (
            self.value(where, "layer_name", chunks, parquet.read_text),
            self.value(where, "shape", chunks, _read_shape),
            self.value(where, "dtype", chunks, parquet.read_text),
            self.value(where, "num_params", chunks, parquet.read_int64),
            self.value(where, "crc32", chunks, parquet.read_uint32),
            "byte_planes" in self.columns
            and self.value(where, "byte_planes", chunks, parquet.read_boolean),
        )

    def value(
        self, where: str, name: str, chunks: list[parquet.Chunk], read: Callable[[bytes, int], T]
    ) -> T:
        """The value of a column, which `read` makes of its page and how many values that has.

        Raises:
            BadOffset: it is said to lie elsewhere than between the file's ends.
            BadSchema: Parquet, but not as Arrowhead writes it.
            NotAWeightFile: not even that.
        """
        chunk = chunks[self.columns[name]]
        if chunk.stored_bytes > _MOST_DESCRIPTION and name != "scales":
            raise BadSchema(
                f"{where}: {name} takes more than the {_MOST_DESCRIPTION} bytes that describe a "
                "tensor"
            )
        _check_within(where, name, chunk, self.data_end)
        if chunk.codec != parquet.UNCOMPRESSED or not chunk.plain:
            raise BadSchema(f"{where}: {name} is compressed or has a dictionary; {_REWRITTEN}")
        raw = self._buffer[chunk.offset : chunk.offset + chunk.stored_bytes]
        try:
            return read(self._pages[name](raw, chunk.num_values), chunk.num_values)
        except parquet.Foreign as error:
            raise BadSchema(f"{where}: {name} {error}; {_REWRITTEN}") from error
        except parquet.Unreadable as error:
            raise NotAWeightFile(
                f"{where}: {name} cannot be read: {error}; convert the model again"
            ) from error


def _read_shape(page: bytes, num_values: int) -> tuple[int, ...]:
    if num_values > _MOST_DIMENSIONS:
        raise parquet.Foreign(f"has {num_values} dimensions, {_MOST_DIMENSIONS} at most")
    return tuple(np.frombuffer(parquet.read_list(page, num_values, 4), "<i4").tolist())


def _read_scales(
    where: str, shape: tuple[int, ...], rows: _Descriptions, chunks: list[parquet.Chunk]
) -> Scales:
    count = rows_scaled("int8", shape)
    wanted = f"{where}: int8 {list(shape)} wants {count} finite scales"
    if "scales" not in rows.columns:
        raise BadSchema(f"{wanted}; the file has no column 'scales'")
    # Its declared size first, or a small file could fill memory.
    chunk = chunks[rows.columns["scales"]]
    if chunk.stored_bytes > 8 * count + _PAGE_OVERHEAD or chunk.num_values > max(count, 1):
        raise BadShape(f"{wanted}, met {chunk.num_values} in {chunk.stored_bytes} bytes")
    raw = rows.value(where, "scales", chunks, lambda page, n: parquet.read_list(page, n, 4))
    values: Scales = np.frombuffer(raw, "<f4")
    if len(values) != count or not np.isfinite(values).all():
        raise BadShape(f"{wanted}, met {len(values)}")
    return values


def rows_scaled(dtype: str, shape: tuple[int, ...]) -> int:
    """How many scales a tensor has: one a row of int8, none where there are no elements."""
    return shape[0] if dtype == "int8" and shape and 0 not in shape else 0


def _check_within(where: str, column: str, chunk: parquet.Chunk, data_end: int) -> None:
    end = chunk.offset + chunk.stored_bytes
    if chunk.offset < len(MAGIC) or chunk.stored_bytes < 0 or end > data_end:
        raise BadOffset(
            f"{where}: its {column} is said to lie at bytes {chunk.offset}-{end}, outside the "
            f"file's data (bytes {len(MAGIC)}-{data_end})"
        )


def _locate(where: str, buffer: mmap.mmap, chunk: parquet.Chunk, nbytes: int) -> int:
    """Where a plain tensor's bytes start, proved by the length that Parquet writes before them."""
    start = chunk.offset + chunk.stored_bytes - nbytes
    length = int.from_bytes(buffer[max(start - 4, 0) : max(start, 0)], "little")
    if start - 4 <= chunk.offset or length != nbytes:
        raise SizeMismatch(
            f"{where}: shape x dtype takes {nbytes} bytes, the file does not hold that many for it "
            f"({chunk.stored_bytes} with their page header)"
        )
    if start % ALIGNMENT:
        raise BadOffset(f"{where}: its data starts at byte {start}, not a multiple of {ALIGNMENT}")
    return start


def _check_compressed(where: str, chunk: parquet.Chunk, nbytes: int) -> None:
    if chunk.codec not in _CODECS:
        raise BadSchema(
            f"{where}: its data is compressed by Parquet's codec {chunk.codec}, neither ZSTD nor "
            f"LZ4_RAW; {_REWRITTEN}"
        )
    # The sizes that are declared, or a small file could fill memory.
    if nbytes > MAX_TENSOR_BYTES or not nbytes <= chunk.plain_bytes <= nbytes + _PAGE_OVERHEAD:
        raise SizeMismatch(
            f"{where}: {chunk.plain_bytes} bytes uncompressed, shape x dtype takes {nbytes}"
        )


def _decompressed(
    where: str, buffer: mmap.mmap, chunk: parquet.Chunk, nbytes: int
) -> npt.NDArray[np.uint8]:
    """The one value of a compressed chunk, uint8 [nbytes], not to be written to."""
    import pyarrow as pa  # for the codecs only: half a second and 30 MB that mapped files save

    end = chunk.offset + chunk.stored_bytes
    try:
        header = parquet.read_page_header(
            buffer[chunk.offset : min(end, chunk.offset + parquet.MOST_PAGE_HEADER)]
        )
        start = chunk.offset + len(header.raw)
        if header.stored_bytes != end - start or header.plain_bytes != nbytes + _LENGTH:
            raise parquet.Unreadable(
                f"a page of {header.plain_bytes} bytes, {header.stored_bytes} compressed"
            )
        value = pa.Codec(_CODECS[chunk.codec]).decompress(
            memoryview(buffer)[start:end], decompressed_size=nbytes + _LENGTH
        )
    except (parquet.Unreadable, parquet.Foreign, pa.ArrowException, OSError) as error:
        raise SizeMismatch(f"{where}: cannot be decompressed: {error}") from error
    raw = np.frombuffer(value, np.uint8)
    length = int.from_bytes(raw[:_LENGTH].tobytes(), "little")
    if length != nbytes:
        raise SizeMismatch(f"{where}: decompresses to {length} bytes, not {nbytes}")
    return raw[_LENGTH:]


def _check_overlap(path: Path, tensors: Mapping[str, TensorInfo]) -> None:
    reached, before = 0, ""
    for tensor in sorted(tensors.values(), key=lambda t: t.offset or 0):
        if tensor.offset is None:
            continue
        if tensor.offset < reached:
            raise BadOffset(f"{path}: {tensor.name}: its data overlaps that of {before}")
        reached, before = tensor.offset + tensor.nbytes, tensor.name
