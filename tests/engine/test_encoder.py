# SPDX-License-Identifier: Apache-2.0
"""The engine's vectors are the source library's; what is not right is refused."""

from __future__ import annotations

import base64
import hashlib
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from arrowhead_conversion.certificate import PROBES, TEXTS
from arrowhead_engine import bert, compute
from arrowhead_engine.encoder import Encoder
from arrowhead_engine.errors import (
    CertificateMismatch,
    ChecksumMismatch,
    InvalidInput,
    UnsupportedModel,
    WeightsMismatch,
)
from arrowhead_engine.spec import CERTIFICATE_KEY, MODEL_KEY, Ids, ModelSpec
from arrowhead_engine.tensors import view
from arrowhead_engine.tokenizer import Tokenizer
from arrowhead_engine.weightfile import Tensor, WeightFile
from arrowhead_engine.weightwriter import write

Vectors = npt.NDArray[np.float32]
HEAD = {"in_features": 384, "out_features": 384, "bias": True, "activation": "Tanh"}
VECTOR = base64.b64encode(np.ones(384, "<f4").tobytes()).decode()


WAYS = ["torch float32", "torch bfloat16", "native float32", "native bfloat16", "native int8"]


@pytest.fixture(scope="module", params=WAYS)
def encoder(request: pytest.FixtureRequest, minilm_weights: Path) -> Encoder:
    engine, dtype = request.param.split()
    if engine == "native" and (why := compute._not_native("cpu", dtype, plain=True)):
        pytest.skip(f"no native engine: {why}")
    return Encoder.open(minilm_weights, device="cpu", dtype=dtype, engine=engine)


@pytest.fixture(scope="module")
def ids(tokenizer: Tokenizer, texts: list[str]) -> list[Ids]:
    return [np.array(row, np.int32) for row in tokenizer.encode(texts)[0]]


def cosines(a: Vectors, b: Vectors) -> Vectors:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


LEAST = {"float32": 0.99999, "bfloat16": 0.9999, "int8": 0.995}


def test_equals_sentence_transformers(encoder: Encoder, ids: list[Ids], reference: Vectors) -> None:
    met = encoder.embed(ids)
    assert met.dtype == np.float32
    assert met.shape == reference.shape
    assert cosines(met, reference).min() >= LEAST[encoder.compute.dtype]
    np.testing.assert_allclose(np.linalg.norm(met, axis=1), 1, atol=1e-5)


def test_alone_equals_in_a_batch_in_any_order(encoder: Encoder, ids: list[Ids]) -> None:
    together = encoder.embed(ids)
    alone = np.concatenate([encoder.embed([row]) for row in ids])
    shuffle = np.random.default_rng(3).permutation(len(ids))
    shuffled = encoder.embed([ids[i] for i in shuffle])
    if encoder.compute.engine == "native":
        np.testing.assert_array_equal(together, alone)
        np.testing.assert_array_equal(together[shuffle], shuffled)
    # torch rounds a bfloat16 product differently for another number of rows.
    least = 0.999999 if encoder.compute.dtype == "float32" else 0.99995
    assert cosines(together, alone).min() >= least
    assert cosines(together[shuffle], shuffled).min() >= least


def test_a_batch_beyond_the_token_budget_is_split(
    minilm_weights: Path, ids: list[Ids], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = Encoder.open(minilm_weights, device="cpu", dtype="float32", engine="torch")
    whole = encoder.embed(ids)
    monkeypatch.setattr(encoder._engine, "token_budget", 300)
    assert cosines(encoder.embed(ids), whole).min() >= 0.999999


def test_equal_texts_are_computed_once(encoder: Encoder, ids: list[Ids]) -> None:
    computed: list[int] = []
    engine = encoder._engine

    def counting(rows: Sequence[Ids], skips: Sequence[int] | None) -> Vectors:
        computed.append(len(rows))
        return engine(rows, skips)

    encoder._engine = counting
    try:
        met = encoder.embed([ids[3], ids[5], ids[3], ids[3]])
    finally:
        encoder._engine = engine
    assert computed == [2]
    np.testing.assert_array_equal(met, encoder.embed([ids[3], ids[5]])[[0, 1, 0, 0]])


def test_the_certificate_holds_here(encoder: Encoder) -> None:
    encoder.verify()


def test_embedding_nothing(encoder: Encoder) -> None:
    assert encoder.embed([]).shape == (0, 384)


def row_of(*values: int) -> npt.NDArray[np.int32]:
    return np.array([values], np.int32)


@pytest.mark.parametrize(
    ("input_ids", "length", "message"),
    [
        (row_of(101, 102), [[0]], r"row 0: length 0; wanted 1 to 2"),
        (row_of(101, 102), [[-1]], r"row 0: length -1; wanted 1 to 2"),
        (row_of(101, 102), [[3]], r"row 0: length 3; wanted 1 to 2"),
        (np.zeros((1, 400), np.int32), [[257]], r"length 257; wanted 1 to 256"),
        (row_of(101, 30522), [[2]], r"row 0: ids from 101 to 30522; wanted 0 to 30521"),
        (row_of(-1, 102), [[2]], r"row 0: ids from -1 to 102"),
        (row_of(101, 102), [[2], [2]], r"2 lengths for 1 rows"),
        (np.zeros((1, 0), np.int32), [[1]], r"row 0: length 1; wanted 1 to 0"),
        (np.array([[1, 1], [1, 99999]], np.int32), [[2], [2]], r"row 1: ids from 1 to 99999"),
        (np.array([[1.5, 1.5]]), [[2]], r"input_ids is of float64; wanted int32"),
        (np.array([[1, 2]], object), [[2]], r"input_ids is of object; wanted int32"),
        (np.array([101, 102], np.int32), [2], r"input_ids has 1 axes; wanted two"),
        (np.zeros((1, 2, 2), np.int32), [[2]], r"input_ids has 3 axes; wanted two"),
    ],
)
def test_bad_ids_are_refused_by_row(
    encoder: Encoder, input_ids: npt.NDArray[np.int32], length: list[list[int]], message: str
) -> None:
    with pytest.raises(InvalidInput, match=message):
        encoder.check(input_ids, np.array(length, np.int32))


@pytest.mark.parametrize("length", [np.array([[np.nan]]), np.array([[2.0]]), np.array([[True]])])
def test_lengths_that_are_no_numbers_of_ids_are_refused(
    encoder: Encoder, length: npt.NDArray[Any]
) -> None:
    with pytest.raises(InvalidInput, match=f"length is of {length.dtype}; wanted int32"):
        encoder.check(row_of(101, 102), length)


@pytest.mark.parametrize("kind", ["<i8", ">i4", "<u4", "<i2"])
def test_ids_of_another_width_are_the_same_ids(encoder: Encoder, kind: str) -> None:
    """The kernels read int32: of wider ids, zeros would be ids between ids, past the row's end."""
    row = row_of(101, 2204, 3793, 102)
    wanted = encoder.embed(encoder.check(row, np.array([4], np.int32)))
    rows = np.repeat(row, 2, axis=0).astype(kind)  # equal ones are computed once, from their bytes
    met = encoder.embed(encoder.check(rows, np.array([[4], [4]], np.int64)))
    np.testing.assert_array_equal(met, np.repeat(wanted, 2, axis=0))


def test_padding_is_not_looked_at(encoder: Encoder) -> None:
    rows = encoder.check(row_of(101, 7592, 102, 999_999, -5), np.array([[3]], np.int32))
    assert [row.tolist() for row in rows] == [[101, 7592, 102]]


def test_word_embeddings_stay_in_the_map(minilm_weights: Path) -> None:
    encoder = Encoder.open(minilm_weights, device="cpu", dtype="float32", engine="torch")
    base = np.frombuffer(encoder._weights.map(), np.uint8)
    table = encoder._engine.network.words.table  # type: ignore[attr-defined]
    assert table.dtype == torch.float16
    assert 0 < table.data_ptr() - base.ctypes.data < base.nbytes


def test_one_copy_of_the_span_holds_every_tensor(minilm_weights: Path) -> None:
    """What moves to a GPU: one block, of which the tensors are views."""
    weights = WeightFile.open(minilm_weights)
    first, last = weights.span
    copy = torch.frombuffer(bytearray(weights.map()[first:last]), dtype=torch.uint8)
    inside = range(copy.data_ptr(), copy.data_ptr() + copy.nbytes)
    for name, info in weights.tensors.items():
        met = view(weights, copy, name)
        assert met.data_ptr() in inside
        assert met.shape == info.shape
        assert bytes(met.reshape(-1).view(torch.uint8).numpy()) == bytes(weights.buffer(name))


def test_compressed_files_give_the_same_vectors(
    minilm_weights: Path, tmp_path: Path, ids: list[Ids]
) -> None:
    path = tmp_path / "weights.parquet"
    with WeightFile.open(minilm_weights) as weights:
        write(path, weights.stream(), weights.metadata, "zstd")
    assert path.stat().st_size < minilm_weights.stat().st_size
    met = Encoder.open(path, device="cpu", dtype="float32").embed(ids)
    wanted = Encoder.open(minilm_weights, device="cpu", dtype="float32").embed(ids)
    np.testing.assert_array_equal(met, wanted)


def test_one_flipped_bit_is_found_at_load(minilm_weights: Path, tmp_path: Path) -> None:
    raw = bytearray(minilm_weights.read_bytes())
    info = WeightFile.open(minilm_weights).tensors["encoder.layer.5.output.dense.weight"]
    assert info.offset is not None
    raw[info.offset + 1000] ^= 1
    path = tmp_path / "weights.parquet"
    path.write_bytes(bytes(raw))
    with pytest.raises(ChecksumMismatch, match=r"encoder\.layer\.5\.output\.dense\.weight"):
        Encoder.open(path).verify()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_other_weights_under_a_good_checksum_fail_the_certificate(
    minilm_weights: Path, tmp_path: Path, dtype: str
) -> None:
    path = tmp_path / "weights.parquet"
    with WeightFile.open(minilm_weights) as weights:
        spoiled = [
            t._replace(data=bytes(len(t.data)))
            if t.name.endswith("layer.0.output.dense.bias")
            else t
            for t in weights.stream()
        ]
        write(path, spoiled, _certifying(spoiled, weights.metadata))
    with pytest.raises(CertificateMismatch, match="cosine"):
        Encoder.open(path, device="cpu", dtype=dtype).verify()


def test_one_changed_weight_under_a_good_checksum_is_found(
    minilm_weights: Path, tmp_path: Path
) -> None:
    """Too little for a vector to show; the certificate's hash of the weights does."""
    path = tmp_path / "weights.parquet"
    with WeightFile.open(minilm_weights) as weights:
        tensors = list(weights.stream())
        data = bytearray(tensors[-1].data)
        data[0] ^= 1
        write(path, [*tensors[:-1], tensors[-1]._replace(data=bytes(data))], weights.metadata)
    with pytest.raises(CertificateMismatch, match="not the certified weights"):
        Encoder.open(path).verify()


@pytest.mark.parametrize("change", [{"normalize": False}, {"max_seq_length": 100}])
def test_another_spec_than_the_certified_one_is_refused(
    minilm_weights: Path, tmp_path: Path, change: dict[str, object]
) -> None:
    path = tmp_path / "weights.parquet"
    with WeightFile.open(minilm_weights) as weights:
        spec = {**json.loads(weights.metadata[MODEL_KEY]), **change}
        write(path, weights.stream(), {**weights.metadata, MODEL_KEY: json.dumps(spec)})
    with pytest.raises(CertificateMismatch, match="not the certified pooling and limits"):
        Encoder.open(path).verify()


def test_a_vector_of_another_length_is_not_the_certified_one(minilm_weights: Path) -> None:
    encoder = Encoder.open(minilm_weights, device="cpu", dtype="float32")
    right = encoder.embed
    encoder.embed = lambda ids: right(ids) * 2  # type: ignore[method-assign]
    with pytest.raises(CertificateMismatch, match=r"2\.0000 times its length"):
        encoder.verify()


def test_missing_unexpected_and_misshapen_tensors_are_told_at_once(
    minilm_weights: Path, tmp_path: Path
) -> None:
    path = tmp_path / "weights.parquet"
    with WeightFile.open(minilm_weights) as weights:
        tensors = list(weights.stream())
        tensors[0] = tensors[0]._replace(shape=tensors[0].shape[::-1])
        tensors[1] = tensors[1]._replace(name="surprise")
        write(path, tensors, weights.metadata)
    with pytest.raises(WeightsMismatch) as caught:
        Encoder.open(path)
    message = str(caught.value)
    assert "missing embeddings.position_embeddings.weight" in message
    assert "unexpected surprise" in message
    assert "embeddings.word_embeddings.weight is [384, 30522], wanted [30522, 384]" in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "new", "config": {"model_type": "new"}}, "architecture 'new'"),
        ({"config": {"hidden_act": "relu"}}, "hidden_act is 'relu'"),
        ({"config": {"position_embedding_type": "relative_key"}}, "relative_key"),
        ({"config": {"num_attention_heads": 7}}, "not a multiple"),
        ({"pooling": "median"}, "pooling 'median'"),
        ({"pooling": "mean+median"}, "pooling 'median'"),
        ({"pooling": "mean+cls"}, "dimension 384; the model's is 768"),
        ({"heads": [{"in_features": 3}]}, "heads is not one this engine knows"),
        ({"heads": [HEAD | {"in_features": 3}]}, "takes 3 features, it is given 384"),
        ({"heads": [HEAD | {"activation": "Softmax"}]}, "activation is 'Softmax'; known are"),
        ({"heads": [HEAD | {"out_features": 0}]}, "out_features is 0"),
        ({"excluded_prompts": [{"ids": []}]}, "excluded_prompts holds"),
        ({"default_prompt": 3}, "default_prompt is 3"),
        ({"max_seq_length": 513}, "max_seq_length 513; the network has positions for 512"),
        ({"max_seq_length": "256"}, "max_seq_length is '256'"),
        ({"dimension": 383}, "dimension 383"),
        ({"config": {"num_attention_heads": 0}}, "num_attention_heads is 0"),
        ({"config": {"num_hidden_layers": "6"}}, "num_hidden_layers is '6'"),
        ({"config": {"layer_norm_eps": "x"}}, "layer_norm_eps is 'x'"),
        ({"config": {"num_hidden_layers": 10**9}}, "num_hidden_layers is 1000000000; the file has"),
        ({"architecture": "modernbert", "config": {"rope_parameters": 7}}, "config is none of"),
        ({"prompts": {"query": 7}}, "prompts is"),
        ({"excluded_prompts": [{"ids": [1], "tokens": float("inf")}]}, "excluded_prompts holds"),
        ({"excluded_prompts": [{"ids": [1.5], "tokens": 3}]}, "excluded_prompts holds"),
        ({"pooling": []}, r"pooling is \[\]"),
        ({"normalize": 1}, "normalize is 1"),
    ],
)
def test_a_model_that_would_come_out_wrong_is_refused(
    minilm_weights: Path, change: dict[str, object], message: str
) -> None:
    weights = WeightFile.open(minilm_weights)
    spec = json.loads(weights.metadata[MODEL_KEY])
    for key, value in change.items():
        spec[key] = {**spec[key], **value} if isinstance(value, dict) else value
    with pytest.raises(UnsupportedModel, match=message):
        Encoder(weights, ModelSpec(**spec))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (MODEL_KEY, None, "no arrowhead.model"),
        (MODEL_KEY, "{", "arrowhead.model is not one"),
        (MODEL_KEY, "[" * 100_000, "arrowhead.model is not one"),
        (MODEL_KEY, "7", "arrowhead.model is not one"),
        (MODEL_KEY, '{"architecture": "bert"}', "arrowhead.model is not one"),
        (CERTIFICATE_KEY, None, "no arrowhead.certificate"),
        (CERTIFICATE_KEY, '{"probes": 3}', "arrowhead.certificate is not one"),
        (CERTIFICATE_KEY, "7", "arrowhead.certificate is not one"),
        (CERTIFICATE_KEY, {"weights_sha256": [7]}, "weights_sha256 is"),
        (CERTIFICATE_KEY, {"bfloat16_cosine": "1"}, "bfloat16_cosine is '1'"),
        (CERTIFICATE_KEY, {"probes": [{"input_ids": ["1"], "embedding": VECTOR}]}, "input_ids is"),
        (CERTIFICATE_KEY, {"probes": [{"input_ids": [2**40], "embedding": VECTOR}]}, "input_ids"),
        (CERTIFICATE_KEY, {"probes": []}, "holds no probes"),
        (CERTIFICATE_KEY, {"probes": [{"input_ids": [99999], "embedding": VECTOR}]}, "99999"),
        (CERTIFICATE_KEY, {"probes": [{"input_ids": [], "embedding": VECTOR}]}, "length 0"),
        (CERTIFICATE_KEY, {"probes": [{"input_ids": [1], "embedding": ""}]}, "another width"),
    ],
)
def test_metadata_that_cannot_be_understood_is_refused(
    minilm_weights: Path, tmp_path: Path, key: str, value: str | dict[str, Any] | None, message: str
) -> None:
    path = tmp_path / "weights.parquet"
    with WeightFile.open(minilm_weights) as weights:
        if isinstance(value, dict):  # changes to what is there
            value = json.dumps({**json.loads(weights.metadata[key]), **value})
        metadata = {k: v for k, v in weights.metadata.items() if k != key}
        write(path, weights.stream(), metadata | ({key: value} if value is not None else {}))
    with pytest.raises(UnsupportedModel, match=message):
        Encoder.open(path, device="cpu", dtype="float32").verify()


def test_the_certificate_is_near_the_reference_and_holds_our_own_vectors(
    minilm_weights: Path, sentence_transformer: Any
) -> None:
    certificate = json.loads(WeightFile.open(minilm_weights).metadata[CERTIFICATE_KEY])
    assert certificate["worst_cosine"] >= 0.99999
    assert certificate["worst_cosine"] <= certificate["mean_cosine"] <= 1 + 1e-9
    assert 0.9999 < certificate["bfloat16_cosine"] < 1
    assert len(certificate["probes"]) == len(PROBES)
    encoder = Encoder.open(minilm_weights, device="cpu", dtype="float32")
    for probe, place in zip(certificate["probes"], PROBES, strict=True):
        vector = np.frombuffer(base64.b64decode(probe["embedding"]), "<f4")
        ours = encoder.embed([np.array(probe["input_ids"], np.int32)])[0]
        np.testing.assert_allclose(vector, ours, atol=1e-6)
        np.testing.assert_allclose(vector, sentence_transformer.encode(TEXTS[place]), atol=1e-3)


def test_it_imports_no_transformers_and_no_network_library() -> None:
    unwanted = (
        "{'transformers', 'sentence_transformers', 'tritonclient', 'huggingface_hub', 'requests'}"
    )
    code = f"import arrowhead_engine.encoder, sys; print({unwanted} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


def test_a_config_with_a_size_missing_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match=r"config\.json has no num_hidden_layers"):
        bert.BertConfig.from_dict({"hidden_size": 24, "hidden_act": "gelu"})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", "float16"])
def test_equals_sentence_transformers_on_cuda(
    minilm_weights: Path, dtype: str, ids: list[Ids], reference: Vectors
) -> None:
    encoder = Encoder.open(minilm_weights, device="cuda", dtype=dtype)
    encoder.verify()
    assert cosines(encoder.embed(ids), reference).min() >= 0.9999


def _certifying(tensors: list[Tensor], metadata: dict[str, str]) -> dict[str, str]:
    """The metadata with its certificate naming these weights as the right ones."""
    digest = hashlib.sha256(b"".join(bytes(tensor.data) for tensor in tensors)).hexdigest()
    certificate = {**json.loads(metadata[CERTIFICATE_KEY]), "weights_sha256": digest}
    return {**metadata, CERTIFICATE_KEY: json.dumps(certificate)}
