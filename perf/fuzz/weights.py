# SPDX-License-Identifier: Apache-2.0
"""The weight file: its bytes, then what is written in it of the model."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from hypothesis import strategies as st

from arrowhead_engine import parquet
from arrowhead_engine.architectures import architecture
from arrowhead_engine.encoder import Encoder
from arrowhead_engine.errors import EngineError, WeightFileError
from arrowhead_engine.spec import (
    CERTIFICATE_KEY,
    MODEL_KEY,
    Certificate,
    ModelSpec,
    Probe,
    info,
    model_sha256,
)
from arrowhead_engine.weightfile import Tensor, WeightFile
from arrowhead_engine.weightwriter import Compression, write
from perf.fuzz.json_edits import DEEP, edited
from perf.fuzz.target import Check, Target, plain

_KINDS: dict[str, Compression] = {"none": "none", "int8": "none", "lz4": "lz4", "zstd": "zstd"}
_AFTER = 8  # bytes behind the footer: its length, and the magic

# A network that the kernels take, as small as there is.
_SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "intermediate_size": 32,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
}


class Edit(NamedTuple):
    """Bytes `at` a place (of the footer, or of the whole file) that give way to others."""

    in_footer: bool
    at: int
    removed: int
    put: bytes


class Edits(NamedTuple):
    """A file, and what is done to it; the footer's length is put right, or left as it was."""

    kind: str
    edits: tuple[Edit, ...]
    mended: bool


_VARINTS = [b"\xff" * 9 + b"\x01", b"\x80" * 10, b"\xff\xff\xff\xff\x0f", b"\xfe\xff\xff\xff\x0f"]
_PUT = st.one_of(st.binary(max_size=3), st.sampled_from([*_VARINTS, b"\x15\xff", b"\x19\xfc", b""]))
_EDIT = st.builds(
    Edit,
    st.sampled_from([True, True, True, False]),
    st.integers(0, 20_000),
    st.integers(0, 4),
    _PUT,
)
_EDITS = st.builds(
    Edits,
    st.sampled_from(list(_KINDS)),
    st.lists(_EDIT, max_size=4).map(tuple),
    st.sampled_from([True, True, True, False]),
)


@contextmanager
def _files(repository: Path) -> Iterator[Check]:
    with tempfile.TemporaryDirectory(prefix="arrowhead-fuzz-") as folder:
        path, sound = Path(folder) / "weights.parquet", {}
        for kind, compression in _KINDS.items():
            write(path, _tensors(kind), {"a key": "a value"}, compression)
            sound[kind] = path.read_bytes()

        def check(edits: Edits) -> None:
            raw = _spoilt(sound[edits.kind], edits)
            path.unlink()
            path.write_bytes(raw)
            _check_file(path, len(raw), edits.kind)

        yield check


def _tensors(kind: str) -> list[Tensor]:
    """Three of equal size, whose bytes differ."""
    if kind == "int8":
        scales = np.arange(8, dtype=np.float32)
        return [Tensor(f"t{i}", "int8", (8, 32), bytes([i + 1]) * 256, scales) for i in range(3)]
    return [Tensor(f"t{i}", "float16", (8, 16), bytes([i + 1]) * 256) for i in range(3)]


def _spoilt(raw: bytes, edits: Edits) -> bytes:
    changed = bytearray(raw[:-_AFTER])
    footer = len(changed) - int.from_bytes(raw[-_AFTER:-4], "little")
    length = len(changed) - footer
    for edit in edits.edits:
        begin = footer if edit.in_footer else 0
        at = begin + edit.at % max(len(changed) - begin, 1)
        changed[at : at + edit.removed] = edit.put
    if edits.mended:
        length = max(len(changed) - footer, 0)
    return bytes(changed) + length.to_bytes(4, "little") + raw[-4:]


def _check_file(path: Path, size: int, kind: str) -> None:
    try:
        weights = WeightFile.open(path)
    except WeightFileError as error:
        _check_told(error)
        return
    with weights:
        written = {tensor.name: tensor for tensor in _tensors(kind)}
        for name, told in weights.tensors.items():
            if told.offset is not None:
                assert 4 < told.offset <= told.offset + told.nbytes <= size - _AFTER
                assert told.offset % 64 == 0
            try:
                assert weights.buffer(name).nbytes == told.nbytes
                assert weights.float32(name).shape == told.shape
            except WeightFileError as error:
                _check_told(error)
        try:
            weights.verify()
        except WeightFileError as error:
            _check_told(error)
            return
        # Its checksums are right: whatever it is called, each tensor is one that was written.
        for name in weights.tensors:
            assert bytes(weights.buffer(name)) in {bytes(one.data) for one in written.values()}


def _check_told(error: EngineError) -> None:
    told = str(error)
    assert 0 < len(told) <= 1000, f"{len(told)} characters of an error"
    assert told.isprintable(), f"not printable: {told!r:.200}"


def _check_footer(raw: bytes) -> None:
    try:
        footer = parquet.read_footer(raw)
    except parquet.Unreadable:
        return
    leaves = max((column.leaf for column in footer.columns), default=-1)
    assert all(leaves < len(group.chunks) for group in footer.row_groups)


class Described(NamedTuple):
    """A sound model's description and certificate, either spoilt."""

    model: bytes
    certificate: bytes


@contextmanager
def _descriptions(repository: Path) -> Iterator[Check]:
    with tempfile.TemporaryDirectory(prefix="arrowhead-fuzz-") as folder:
        path = Path(folder) / "weights.parquet"
        write(path, _network(), _METADATA)
        with suppress(EngineError):  # imports transformers, which would count as a slow input
            architecture("none").config({"model_type": "none"})
        with WeightFile.open(path) as weights:

            def check(described: Described) -> None:
                weights.metadata = {
                    MODEL_KEY: described.model.decode("utf-8", "replace"),
                    CERTIFICATE_KEY: described.certificate.decode("utf-8", "replace"),
                }
                _check_description(weights)

            yield check


def _check_description(weights: WeightFile) -> None:
    for read in (ModelSpec.from_metadata, Certificate.from_metadata, info):
        try:
            read(weights.metadata)
        except EngineError as error:
            _check_told(error)
    try:
        encoder = Encoder(weights, ModelSpec.from_metadata(weights.metadata), dtype="float32")
        encoder.verify()
    except EngineError as error:
        _check_told(error)
        return
    # Certified: it computes what it did before.
    vector = encoder.embed(encoder.check(np.array([_IDS], np.int32), np.array([len(_IDS)])))
    assert vector.shape == (1, encoder.spec.dimension)
    assert np.isfinite(vector).all()


_IDS = (2, 7, 11, 3)


def _network() -> list[Tensor]:
    kind, random = architecture("bert"), np.random.default_rng(1)
    shapes = kind.shapes(kind.config(_SIZES))
    return [
        Tensor(name, "float16", shape, random.standard_normal(shape).astype("<f2").tobytes())
        for name, shape in shapes.items()
    ]


def _certified() -> dict[str, str]:
    """What is written in the file of `_network`, the vector that it gives among it."""
    spec = ModelSpec("bert", dict(_SIZES), "mean", True, 16, 32, prompts={"query": "query: "})
    with tempfile.TemporaryDirectory(prefix="arrowhead-fuzz-") as folder:
        path = Path(folder) / "weights.parquet"
        write(path, _network(), {MODEL_KEY: spec.to_json()})
        with WeightFile.open(path) as weights:
            encoder = Encoder(weights, spec, dtype="float32")
            vector = encoder.embed([np.array(_IDS, np.int32)])[0]
            proof = Certificate(
                worst_cosine=1.0,
                mean_cosine=1.0,
                texts=1,
                weights_sha256=weights.sha256(),
                tokenizer_sha256="0" * 64,
                model_sha256=model_sha256(weights.metadata),
                versions={"arrowhead": "0"},
                probes=(Probe(_IDS, vector),),
                ranges=np.array([[-1.0], [1.0]], np.float32).repeat(32, 1),
            )
    return {MODEL_KEY: spec.to_json(), CERTIFICATE_KEY: proof.to_json()}


_METADATA = _certified()
_MODEL: dict[str, Any] = json.loads(_METADATA[MODEL_KEY])
_PROOF: dict[str, Any] = json.loads(_METADATA[CERTIFICATE_KEY])
_PROBE = _PROOF["probes"][0]


@st.composite
def _described(draw: st.DrawFn) -> Described:
    return Described(
        draw(st.one_of(edited(_MODEL), st.just(_METADATA[MODEL_KEY].encode()))),
        draw(st.one_of(edited(_PROOF), st.just(_METADATA[CERTIFICATE_KEY].encode()))),
    )


def _with(document: dict[str, Any], **changes: Any) -> bytes:
    return json.dumps({**document, **changes}).encode()


def _changed(**changes: bytes) -> Described:
    sound = Described(_METADATA[MODEL_KEY].encode(), _METADATA[CERTIFICATE_KEY].encode())
    return sound._replace(**changes)


FILE = Target(
    "weight file: all of its bytes",
    "One of the format's errors, or tensors within the file; with right checksums those that were "
    "written.",
    _EDITS,
    _files,
)
FOOTER = Target(
    "weight file: its footer alone",
    "An answer or `Unreadable`.",
    st.binary(max_size=4096),
    plain(_check_footer),
)
DESCRIPTION = Target(
    "weight file: the model in it",
    "One of the engine's errors, or a model that reproduces its certified vector.",
    _described(),
    _descriptions,
    found=(
        _changed(model=b"[" * DEEP),
        _changed(certificate=b"[" * DEEP),
        _changed(certificate=b"0"),
        _changed(certificate=_with(_PROOF, tokenizer_sha256=[])),
        _changed(certificate=_with(_PROOF, probes=[{**_PROOF["probes"][0], "input_ids": ["", 1]}])),
        _changed(
            certificate=_with(_PROOF, probes=[{**_PROOF["probes"][0], "input_ids": [10**30]}])
        ),
        _changed(model=_with(_MODEL, config={**_SIZES, "num_hidden_layers": 10**9})),
        _changed(model=_with(_MODEL, architecture="modernbert", config={"rope_parameters": 7})),
    ),
)
