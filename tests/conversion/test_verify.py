# SPDX-License-Identifier: Apache-2.0
"""`arrowhead verify` recomputes the certificate, and finds whatever changed since."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from arrowhead_client.cli import main
from arrowhead_conversion.convert import convert
from arrowhead_conversion.errors import NotFaithful, SourceNotFound
from arrowhead_conversion.pipeline import Choices
from arrowhead_conversion.verify import verify
from arrowhead_conversion.weights import Storage
from arrowhead_engine.errors import CertificateMismatch, ChecksumMismatch
from arrowhead_engine.weightfile import WeightFile

from .conftest import edit


@pytest.fixture
def repository(tiny: Path, tmp_path: Path) -> Path:
    convert(str(tiny), "tiny", tmp_path / "repository", progress=False)
    return tmp_path / "repository"


@pytest.mark.parametrize("storage", ["float16", "int8"])
def test_the_certificate_comes_out_as_it_was(tiny: Path, tmp_path: Path, storage: Storage) -> None:
    made = convert(str(tiny), "tiny", tmp_path, storage=storage, progress=False)
    proved = verify("tiny", tmp_path)
    assert proved.recorded.to_json() == made.certificate.to_json()
    assert proved.recomputed is not None
    assert proved.recomputed.worst_cosine == pytest.approx(made.certificate.worst_cosine, abs=1e-6)
    assert proved.recomputed.weights_sha256 == made.certificate.weights_sha256


def test_a_plain_network_and_a_shorter_limit(tiny: Path, tmp_path: Path) -> None:
    (tiny / "modules.json").unlink()
    choices = Choices(pooling="cls", normalize=True, max_seq_length=20)
    convert(str(tiny), "tiny", tmp_path / "r", choices=choices, progress=False)
    assert verify("tiny", tmp_path / "r").recomputed is not None


def test_without_the_source_the_rest_is_proved(repository: Path, tiny: Path) -> None:
    elsewhere = tiny.rename(tiny.with_name("moved"))
    proved = verify("tiny", repository)
    assert proved.recomputed is None
    assert "no such folder" in proved.missing
    assert verify("tiny", repository, source=str(elsewhere)).recomputed is not None
    with pytest.raises(SourceNotFound, match="no such folder"):
        verify("tiny", repository, source="/nowhere")


def test_a_version_that_is_not_there(repository: Path) -> None:
    with pytest.raises(SourceNotFound, match="no 'tiny' version 2; versions there: 1"):
        verify("tiny", repository, version=2)
    with pytest.raises(SourceNotFound, match="no 'other'; versions there: none"):
        verify("other", repository)


def test_a_changed_byte_is_found(repository: Path) -> None:
    path = repository / "tiny_encoder" / "1" / "weights.parquet"
    info = next(iter(WeightFile.open(path).tensors.values()))
    raw = bytearray(path.read_bytes())
    assert info.offset is not None
    raw[info.offset] ^= 1
    path.write_bytes(bytes(raw))
    with pytest.raises(ChecksumMismatch):
        verify("tiny", repository)


def test_a_changed_tokenizer_is_found(repository: Path) -> None:
    path = repository / "tiny_tokenizer" / "1" / "tokenizer.json"
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(CertificateMismatch, match="not the certified tokenizer"):
        verify("tiny", repository)


def test_a_source_that_changed_since_is_found(repository: Path, tiny: Path) -> None:
    kept = shutil.copytree(tiny, tiny.with_name("kept"))
    path = tiny / "model.safetensors"
    tensors = load_file(path)
    tensors["encoder.layer.0.output.dense.weight"] += torch.randn(24, 40) * 0.2
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(NotFaithful, match="has cosine"):
        verify("tiny", repository)
    edit(kept / "1_Pooling" / "config.json", pooling_mode="cls")
    with pytest.raises(NotFaithful, match="its pooling is 'cls', 'mean' was converted"):
        verify("tiny", repository, source=str(kept))
    (kept / "tokenizer.json").write_text(json.dumps({}))
    with pytest.raises(NotFaithful, match="tokenizer is not the one"):
        verify("tiny", repository, source=str(kept))


def test_the_command_prints_both_certificates(repository: Path) -> None:
    result = CliRunner().invoke(main, ["verify", "tiny", "--repository", str(repository)])
    assert result.exit_code == 0, result.output
    first, recorded, recomputed = result.stdout.splitlines()
    assert first == "tiny version 1: checksums, hashes and vectors match"
    assert recorded.split() == ["recorded", *recomputed.split()[1:]]
