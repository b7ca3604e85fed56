# SPDX-License-Identifier: Apache-2.0
"""What an earlier Arrowhead wrote is read for ever; what a later one writes, as far as that goes.

The golden files are made once, by tests/data/golden/make.py, and never again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from arrowhead_engine.encoder import Encoder
from arrowhead_engine.errors import UnsupportedModel, UnsupportedVersion
from arrowhead_engine.spec import CERTIFICATE_KEY, MODEL_KEY, Certificate, ModelSpec, read_metadata
from arrowhead_engine.tokenizer import Tokenizer
from arrowhead_engine.weightfile import ALIGNMENT, FORMAT_VERSION, VERSION_KEY, WeightFile

GOLDEN = Path(__file__).parents[1] / "data" / "golden" / "version-1"
REPOSITORY = GOLDEN / "repository"
# Of the list of all other files' sums. If this does not match, put the files back: whoever
# converted a model with that release still has such files.
SUMS_SHA256 = "ddf42270efb678b1b7c010be52e44f4b50c7fc0fb2294415a64be84904514121"
VERSIONS = {"1": "float16", "2": "bfloat16", "3": "float32", "4": "int8"}


def weights(version: str) -> Path:
    return REPOSITORY / "golden_encoder" / version / "weights.parquet"


@pytest.fixture(scope="module")
def expected() -> Any:
    return json.loads((GOLDEN / "expected.json").read_text(encoding="utf-8"))


def test_the_golden_files_are_as_they_were_made() -> None:
    sums = (GOLDEN / "SHA256SUMS").read_bytes()
    assert hashlib.sha256(sums).hexdigest() == SUMS_SHA256
    listed = {
        path: digest
        for digest, path in (line.split() for line in sums.decode().split("\n") if line)
    }
    met = {
        path.relative_to(GOLDEN).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in GOLDEN.rglob("*")
        if path.is_file() and path.name != "SHA256SUMS" and "__pycache__" not in path.parts
    }
    assert met == listed


@pytest.mark.parametrize("version", VERSIONS)
def test_tensors_are_the_same_to_the_last_bit(version: str, expected: Any) -> None:
    wanted = expected["versions"][version]["tensors"]
    with WeightFile.open(weights(version)) as file:
        assert file.main_dtype == VERSIONS[version]
        file.verify()
        met = {
            name: {
                "dtype": info.dtype,
                "shape": list(info.shape),
                "sha256": hashlib.sha256(file.buffer(name)).hexdigest(),
                "scales_sha256": hashlib.sha256(file.scales(name).tobytes()).hexdigest(),
            }
            for name, info in file.tensors.items()
        }
        certificate = Certificate.from_metadata(file.metadata)
        assert file.sha256() == certificate.weights_sha256
    assert met == wanted


@pytest.mark.parametrize("version", VERSIONS)
def test_other_parquet_readers_see_the_same_rows(version: str, expected: Any) -> None:
    wanted = expected["versions"][version]["tensors"]
    table = pq.read_table(weights(version)).to_pylist()
    assert [(row["layer_name"], row["dtype"], row["shape"]) for row in table] == [
        (name, one["dtype"], one["shape"]) for name, one in wanted.items()
    ]
    for row in table:
        data = np.frombuffer(row["data"], np.uint8)
        if row["byte_planes"]:
            size = {"float32": 4}.get(row["dtype"], 2)
            data = np.ascontiguousarray(data.reshape(size, -1).T).reshape(-1)
        digest = hashlib.sha256(data.tobytes()).hexdigest()
        assert digest == wanted[row["layer_name"]]["sha256"]


@pytest.mark.parametrize("dtype", ["float32", "auto"])
@pytest.mark.parametrize("version", VERSIONS)
def test_vectors_are_the_same(version: str, dtype: str, expected: Any) -> None:
    wanted = expected["versions"][version]
    tokens = Tokenizer.open(REPOSITORY / "golden_tokenizer" / version)(expected["texts"])
    assert tokens.input_ids.tolist() == wanted["input_ids"]
    assert tokens.length.ravel().tolist() == wanted["length"]
    encoder = Encoder.open(weights(version), device="cpu", dtype=dtype)
    encoder.verify()
    met = encoder.embed(encoder.check(tokens.input_ids, tokens.length))
    vectors = np.array(wanted["vectors"], np.float32)
    if dtype == "float32":
        np.testing.assert_allclose(met, vectors, atol=1e-5)
    cosines = (met * vectors).sum(axis=1)  # of length 1, both
    assert cosines.min() > 0.9999


def test_its_metadata_are_read(expected: Any) -> None:
    for folder in ("golden_encoder", "golden_tokenizer"):
        metadata = read_metadata(REPOSITORY / folder / "1" / "metadata.json")
        spec, proof = ModelSpec.from_metadata(metadata), Certificate.from_metadata(metadata)
        assert (spec.dimension, spec.max_seq_length, spec.normalize) == (32, 16, True)
        assert proof.texts >= len(expected["texts"])
        assert proof.ranges is not None
        assert proof.ranges.shape == (2, 32)


def test_a_later_version_is_refused_with_what_to_do(tmp_path: Path) -> None:
    key = VERSION_KEY.encode()
    raw = weights("1").read_bytes()
    value = raw.index(key) + len(key) + 2  # behind the value's type and length
    assert raw[value : value + 1] == b"%d" % FORMAT_VERSION
    path = tmp_path / "weights.parquet"
    path.write_bytes(raw[:value] + b"%d" % (FORMAT_VERSION + 1) + raw[value + 1 :])
    wanted = (
        rf"format version '{FORMAT_VERSION + 1}', this Arrowhead reads {FORMAT_VERSION}; upgrade "
        "Arrowhead, or convert the model again with this one"
    )
    with pytest.raises(UnsupportedVersion, match=wanted):
        WeightFile.open(path)


@pytest.mark.parametrize("version", VERSIONS)
def test_further_columns_and_metadata_are_ignored(
    version: str, tmp_path: Path, expected: Any
) -> None:
    path = tmp_path / "weights.parquet"
    with WeightFile.open(weights(version)) as before:
        rewritten(weights(version), path, {**before.metadata, "arrowhead.later": "[1]"})
        with WeightFile.open(path) as after:
            assert after.mapped == before.mapped
            assert after.metadata["arrowhead.later"] == "[1]"
            assert "later" in pq.read_schema(path).names
            for name in before.tensors:
                assert bytes(after.buffer(name)) == bytes(before.buffer(name))
    wanted = np.array(expected["versions"][version]["vectors"], np.float32)
    tokens = expected["versions"][version]
    encoder = Encoder.open(path, device="cpu", dtype="float32")
    encoder.verify()
    met = encoder.embed(
        encoder.check(
            np.array(tokens["input_ids"], np.int32), np.array(tokens["length"], np.int32)[:, None]
        )
    )
    np.testing.assert_allclose(met, wanted, atol=1e-5)


def rewritten(source: Path, target: Path, metadata: Mapping[str, str]) -> None:
    """The file as a later writer may make it: one more column, and more metadata."""
    table = pq.read_table(source).replace_schema_metadata(None)
    described = pq.read_metadata(source).row_group(0)
    codec = described.column(described.num_columns - 1).compression
    field = pa.field("later", pa.string(), nullable=False)
    column = pa.array([f"of row {number}" for number in range(len(table))])
    schema = pa.schema([field, *pq.read_schema(source)])
    table = table.add_column(0, field, column).cast(schema)
    options = {
        "compression": {"data": codec} if codec != "UNCOMPRESSED" else "none",
        "use_dictionary": False,
        "write_statistics": False,
        "store_schema": False,
        "data_page_version": "1.0",
    }
    padding = table.schema.get_field_index("padding")

    def row(number: int, length: int) -> pa.Table:
        one = table.slice(number, 1)
        column = pa.array([bytes(length)], pa.binary())
        return one.set_column(padding, table.schema.field(padding), column)

    with (
        pa.OSFile(str(target), "wb") as sink,
        pq.ParquetWriter(sink, table.schema, **options) as writer,
    ):
        writer.add_key_value_metadata(dict(metadata))
        for number in range(len(table)):
            scratch = pa.BufferOutputStream()
            with pq.ParquetWriter(scratch, table.schema, **options) as trial:
                trial.write_table(row(number, ALIGNMENT))
            chunk = pq.read_metadata(pa.BufferReader(scratch.getvalue())).row_group(0)
            data = chunk.column(chunk.num_columns - 1)
            nbytes = len(table["data"][number].as_py())
            start = sink.tell() + data.data_page_offset + data.total_compressed_size - nbytes - 4
            writer.write_table(row(number, ALIGNMENT + -start % ALIGNMENT))


def test_what_a_later_arrowhead_says_of_the_model_is_not_passed_over() -> None:
    """It may change the vectors. A certificate's further fields cannot."""
    metadata = read_metadata(REPOSITORY / "golden_encoder" / "1" / "metadata.json")
    proof = {**json.loads(metadata[CERTIFICATE_KEY]), "later": 1}
    assert Certificate.from_metadata({CERTIFICATE_KEY: json.dumps(proof)}).texts > 0
    spec = {**json.loads(metadata[MODEL_KEY]), "later": 1}
    with pytest.raises(UnsupportedModel, match=r"has later, which this .* upgrade Arrowhead"):
        ModelSpec.from_metadata({MODEL_KEY: json.dumps(spec)})
