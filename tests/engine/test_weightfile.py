# SPDX-License-Identifier: Apache-2.0
"""The weight file: what is written is read, in place; other tools read it too."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arrowhead_engine.errors import BadDtype, BadShape, DuplicateTensor, SizeMismatch
from arrowhead_engine.weightfile import ALIGNMENT, ITEM_SIZE, Tensor, WeightFile
from arrowhead_engine.weightwriter import write

RNG = np.random.default_rng(0)


def tensor(name: str, *shape: int, dtype: str = "float16") -> Tensor:
    """Random bytes, NaN patterns and all; int8 with a scale for each row."""
    rows = shape[0] if dtype == "int8" and shape and np.prod(shape) else 0
    data = RNG.bytes(int(np.prod(shape)) * ITEM_SIZE[dtype])
    return Tensor(name, dtype, shape, data, RNG.random(rows, np.float32))


def some_tensors() -> list[Tensor]:
    return [
        tensor("embeddings.word_embeddings.weight", 1000, 384),
        tensor("scalar"),
        tensor("empty", 0, 7),
        tensor("one", 1, dtype="float32"),
        tensor("bias", 383, dtype="bfloat16"),
        tensor("encoder.layer.0.attention.self.query.weight", 384, 384, dtype="float32"),
        tensor("naïve/名前", 3, 5, 7),
        tensor("embeddings.position_embeddings.weight", 512, 384, dtype="int8"),
    ]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "weights.parquet"


@pytest.mark.parametrize("compression", ["none", "lz4", "zstd"])
def test_round_trip_is_bit_identical(path: Path, compression: str) -> None:
    tensors = some_tensors()
    write(path, tensors, {"note": "kept"}, compression)  # type: ignore[arg-type]
    with WeightFile.open(path) as weights:
        assert list(weights.tensors) == [t.name for t in tensors]
        for t in tensors:
            info = weights.tensors[t.name]
            assert (info.dtype, info.shape) == (t.dtype, t.shape)
            assert bytes(weights.buffer(t.name)) == bytes(t.data)
            np.testing.assert_array_equal(weights.scales(t.name), t.scales)
            assert info.byte_planes is (compression != "none" and t.dtype != "int8")
        assert weights.metadata["note"] == "kept"
        assert weights.mapped is (compression == "none")
        weights.verify()


@given(
    st.lists(
        st.tuples(
            st.text(min_size=1, max_size=40).filter(lambda s: s.isprintable()),
            st.sampled_from(sorted(ITEM_SIZE)),
            st.lists(st.integers(0, 9), max_size=4),
        ),
        unique_by=lambda row: row[0],
        max_size=8,
    )
)
def test_any_names_and_shapes_are_aligned_and_read_back(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str, list[int]]]
) -> None:
    path = tmp_path_factory.mktemp("any") / "w.parquet"
    tensors = [tensor(name, *shape, dtype=dtype) for name, dtype, shape in rows]
    write(path, tensors, {})
    weights = WeightFile.open(path)
    for t in tensors:
        info = weights.tensors[t.name]
        assert info.offset is not None
        assert info.offset % ALIGNMENT == 0
        assert path.read_bytes()[info.offset : info.offset + info.nbytes] == bytes(t.data)


def test_tensors_lie_inside_the_map(path: Path) -> None:
    write(path, some_tensors(), {})
    weights = WeightFile.open(path)
    base = np.frombuffer(weights.map(), np.uint8).ctypes.data
    for name, info in weights.tensors.items():
        if info.nbytes:
            address = np.frombuffer(weights.buffer(name), np.uint8).ctypes.data
            assert info.offset is not None
            assert address == base + info.offset
            assert address % ALIGNMENT == 0


IMPORTS_PROBE = """
import sys
from arrowhead_engine.weightfile import WeightFile
with WeightFile.open(sys.argv[1]) as weights:
    weights.verify()
    for name in weights.tensors:
        weights.buffer(name), weights.scales(name), weights.float32(name)
print([name for name in sys.modules if name.split(".")[0] == "pyarrow"])
"""


def test_a_mapped_file_is_read_without_a_parquet_library(path: Path) -> None:
    write(path, some_tensors(), {})
    command = [sys.executable, "-c", IMPORTS_PROBE, str(path)]
    assert subprocess.check_output(command, text=True) == "[]\n"


def test_a_closed_file_leaves_no_map_behind(path: Path) -> None:
    write(path, some_tensors(), {})
    with WeightFile.open(path) as weights:
        weights.verify()
    assert str(path) not in Path("/proc/self/maps").read_text()


def test_views_outlive_the_file_object(path: Path) -> None:
    written = some_tensors()
    write(path, written, {})
    with WeightFile.open(path) as weights:
        view = weights.buffer(written[0].name)
    del weights
    path.unlink()
    assert bytes(view) == written[0].data


MEMORY_PROBE = """
import sys, time
from arrowhead_engine.weightfile import WeightFile

def private_kib():
    with open("/proc/self/smaps_rollup") as file:
        return sum(int(line.split()[1]) for line in file if line.startswith("Private_Dirty"))

def shared_kib(path):
    total, ours = 0, False
    with open("/proc/self/smaps") as file:
        for line in file:
            if "-" in line.split()[0] and ":" not in line.split()[0]:
                ours = line.rstrip().endswith(path)
            elif ours and line.startswith("Shared_Clean"):
                total += int(line.split()[1])
    return total

path = sys.argv[1]
before = private_kib()
weights = WeightFile.open(path)
checksum = sum(sum(weights.buffer(name)[::4096]) for name in weights.tensors)  # touches every page
print(private_kib() - before, flush=True)
sys.stdin.readline()
print(shared_kib(path), flush=True)
"""


def test_mapping_costs_no_private_memory_and_processes_share_pages(path: Path) -> None:
    size_kib = 64 * 1024
    write(path, [tensor(f"t{i}", 1024, 1024) for i in range(32)], {})
    probes = [
        subprocess.Popen(
            [sys.executable, "-c", MEMORY_PROBE, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    try:
        grown = [int(_line(probe)) for probe in probes]
        # Python takes a few MiB of its own; the weights are 64 MiB.
        assert max(grown) < size_kib / 4, grown
        shared = [int(probe.communicate("\n", timeout=60)[0]) for probe in probes]
        assert shared[0] > size_kib * 0.95, shared
    finally:
        for probe in probes:
            probe.kill()
            probe.communicate()


def _line(probe: subprocess.Popen[str]) -> str:
    assert probe.stdout is not None
    return probe.stdout.readline()


def test_other_tools_read_the_same_file(path: Path) -> None:
    tensors = some_tensors()
    write(path, tensors, {})
    names = [t.name for t in tensors]
    wanted = {t.name: bytes(t.data) for t in tensors}

    arrow = pq.read_table(path)
    assert (
        dict(zip(arrow["layer_name"].to_pylist(), arrow["data"].to_pylist(), strict=True)) == wanted
    )

    pandas = pd.read_parquet(path)
    assert list(pandas["layer_name"]) == names
    assert [tuple(shape) for shape in pandas["shape"]] == [t.shape for t in tensors]

    rows = duckdb.read_parquet(str(path)).project("layer_name, num_params, data").fetchall()
    assert {name: data for name, _, data in rows} == wanted
    assert [count for _, count, _ in rows] == [int(np.prod(t.shape)) for t in tensors]


def test_replacing_a_file_leaves_those_who_mapped_it_alone(path: Path) -> None:
    old, new = tensor("w", 64, 64), tensor("w", 64, 64)
    write(path, [old], {})
    mapped = WeightFile.open(path)
    write(path, [new], {})
    assert bytes(mapped.buffer("w")) == old.data
    assert bytes(WeightFile.open(path).buffer("w")) == new.data
    mapped.verify()


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(path: Path) -> None:
    write(path, [tensor("w", 4)], {})
    before = path.read_bytes()

    def dies() -> Iterator[Tensor]:
        yield tensor("w", 1024, 1024)
        raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError, match="disk on fire"):
        write(path, dies(), {})
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("tensors", "error"),
    [
        ([tensor("w", 2), tensor("w", 2)], DuplicateTensor),
        ([Tensor("w", "int4", (2,), b"1234")], BadDtype),
        ([Tensor("w", "float16", (-2, -1), b"1234")], BadShape),
        ([Tensor("w", "float16", (3,), b"1234")], SizeMismatch),
    ],
)
def test_the_writer_refuses_what_the_reader_would(
    path: Path, tensors: list[Tensor], error: type[Exception]
) -> None:
    with pytest.raises(error, match="w: "):
        write(path, tensors, {})
    assert not list(path.parent.iterdir())


def test_stray_writes_to_a_view_never_reach_the_file(path: Path) -> None:
    write(path, [tensor("w", 64)], {})
    before = path.read_bytes()
    WeightFile.open(path).buffer("w")[:4] = b"\0\0\0\0"
    assert path.read_bytes() == before
