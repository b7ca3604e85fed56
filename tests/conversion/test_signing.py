# SPDX-License-Identifier: Apache-2.0
"""`arrowhead sign` and `verify --public-key`, on the real MiniLM."""

from __future__ import annotations

import json
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from arrowhead_client.cli import main
from arrowhead_conversion import pins, registry, settings, signing
from arrowhead_conversion.errors import BadKey, BadSignature, RegistryError


def arrowhead(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def key(tmp_path: Path) -> Path:
    made = arrowhead("sign", "--new-key", tmp_path / "release.pem")
    assert made.exit_code == 0, made.output
    return tmp_path / "release.pem"


@pytest.fixture
def public_key(key: Path) -> Path:
    return key.with_name("release.pem.pub")


@pytest.fixture
def repository(minilm_repository: Path, tmp_path: Path) -> Path:
    return shutil.copytree(minilm_repository, tmp_path / "model_repository")


@pytest.fixture
def signed(repository: Path, key: Path) -> Path:
    made = arrowhead("sign", "minilm", "--key", key, "--repository", repository)
    assert made.exit_code == 0, made.output
    assert made.output.startswith("minilm version 1 is signed with the key ")
    return repository


def check(repository: Path, public_key: Path) -> signing.Statement:
    return signing.check(repository, "minilm", 1, signing.read_public_key(public_key))


def test_every_file_of_the_version_is_signed(signed: Path, public_key: Path) -> None:
    wanted = {
        path.relative_to(signed).as_posix()
        for folder in ("minilm_tokenizer/1", "minilm_encoder/1", "minilm_encoder/warmup")
        for path in (signed / folder).iterdir()
    }
    statement = check(signed, public_key)
    assert statement.files.keys() == wanted - {"minilm_encoder/1/signature.json"}
    assert "minilm_encoder/1/weights.parquet" in statement.files
    assert "minilm_encoder/1/model.py" in statement.files
    assert statement.configurations.keys() == {"minilm", "minilm_encoder", "minilm_tokenizer"}


def test_no_warm_up_comes_in_under_the_name_of_ours(signed: Path, public_key: Path) -> None:
    path = signed / "minilm_encoder" / "config.pbtxt"
    before = path.read_text()
    path.write_text(f"{before}{settings.WARMUP}")  # as `configure --fused` has it
    check(signed, public_key)
    path.write_text(
        f"{before}{settings.WARMUP.replace('batch_size: 1', 'batch_size: 1 count: 4000000000')}"
    )
    try:
        with pytest.raises(signing.BadSignature, match=r"config\.pbtxt"):
            check(signed, public_key)
    finally:
        path.write_text(before)


def test_the_private_key_is_for_its_owner_alone(key: Path, public_key: Path) -> None:
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert b"PRIVATE" not in public_key.read_bytes()
    again = arrowhead("sign", "--new-key", key)
    assert again.exit_code == 1
    assert "is there already" in str(again.stderr)


def test_a_private_key_that_others_may_read_is_refused(
    repository: Path, key: Path, public_key: Path
) -> None:
    key.chmod(0o640)
    with pytest.raises(BadKey, match=r"is open to others \(mode 640\); wanted 600: chmod 600"):
        signing.sign(repository, "minilm", 1, key)
    public_key.chmod(0o600)
    with pytest.raises(BadKey, match="is no private key in PEM"):
        signing.sign(repository, "minilm", 1, public_key)
    assert not signing.signature_path(repository, "minilm", 1).exists()


def test_what_promote_rollback_and_configure_set_is_not_signed(
    signed: Path, public_key: Path
) -> None:
    for part in ("_tokenizer", "_encoder", ""):
        shutil.copytree(signed / f"minilm{part}" / "1", signed / f"minilm{part}" / "2")
    registry.promote(signed, "minilm", 2)
    assert check(signed, public_key).version == 1
    registry.rollback(signed, "minilm")
    registry.propose(signed, "minilm", 2)
    settings.set_compute_dtype(signed, "minilm", "bfloat16")
    settings.set_instances(signed, "minilm", 3)
    settings.set_steps(signed, "minilm", "fused")
    statement = check(signed, public_key)
    candidate = (signed / "minilm_candidate" / "config.pbtxt").read_text()
    signing.check_config(statement, "minilm_candidate", candidate)
    settings.set_steps(signed, "minilm", "two-step")
    check(signed, public_key)


@pytest.mark.parametrize(
    ("folder", "old", "new"),
    [
        ("minilm", "max_batch_size: 100", "max_batch_size: 101"),
        ("minilm", 'model_name: "minilm_encoder"', 'model_name: "other_encoder"'),
        ("minilm_encoder", 'backend: "python"', 'backend: "other"'),
        ("minilm_tokenizer", "dynamic_batching { }", ""),
    ],
)
def test_everything_else_of_a_configuration_is(
    signed: Path, public_key: Path, folder: str, old: str, new: str
) -> None:
    path = signed / folder / "config.pbtxt"
    text = path.read_text()
    path.write_text(f"# a comment changes nothing\n{text}")
    check(signed, public_key)
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(BadSignature, match=f"{folder}/config.pbtxt is not what was signed"):
        check(signed, public_key)
    path.write_text("no configuration")
    with pytest.raises(BadSignature, match="cannot be read"):
        check(signed, public_key)


def test_verify_tells_of_the_signature(signed: Path, public_key: Path, tmp_path: Path) -> None:
    asked = ["verify", "minilm", "--repository", signed, "--public-key", public_key]
    assert "signed       with the key of" in arrowhead(*asked).output
    other = signing.new_key(tmp_path / "other.pem")
    refused = arrowhead(*asked[:-1], other)
    assert refused.exit_code == 1
    assert "was not signed with the key" in refused.stderr
    weights = signed / "minilm_encoder" / "1" / "weights.parquet"
    raw = bytearray(weights.read_bytes())
    raw[len(raw) // 2] ^= 1
    weights.write_bytes(raw)
    refused = arrowhead(*asked)
    assert refused.exit_code == 1
    assert f"{weights} is not the file that was signed" in refused.stderr


def test_a_copy_is_what_was_compared(signed: Path, public_key: Path, tmp_path: Path) -> None:
    key, copy = signing.read_public_key(public_key), tmp_path / "copy"
    statement = signing.check(signed, "minilm", 1, key, copy)
    for file in statement.files:
        assert (copy / file).read_bytes() == (signed / file).read_bytes()
    assert (
        signing.check_config(statement, "minilm", (copy / "minilm/config.pbtxt").read_text())
        is None
    )
    assert not signing.signature_path(copy, "minilm", 1).exists()


def test_a_file_that_grew_is_read_no_further_than_what_was_signed(
    signed: Path, public_key: Path, tmp_path: Path
) -> None:
    path = signed / "minilm_tokenizer" / "1" / "tokenizer.json"
    signed_bytes = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(1 << 40)
    copy, read = tmp_path / "copy", 0

    def count(nbytes: int) -> None:
        nonlocal read
        read += nbytes

    key = signing.read_public_key(public_key)
    with pytest.raises(BadSignature, match=r"tokenizer\.json is not the file"):
        signing.check(signed, "minilm", 1, key, copy, count)
    assert (copy / "minilm_tokenizer" / "1" / "tokenizer.json").stat().st_size <= signed_bytes
    assert read < 1 << 30


def test_no_version_no_signature(repository: Path, key: Path) -> None:
    with pytest.raises(RegistryError, match="holds no 'minilm' version 7; versions there: 1"):
        signing.sign(repository, "minilm", 7, key)
    refused = arrowhead("sign", "minilm", "--repository", repository)
    assert refused.exit_code == 2
    assert "arrowhead sign NAME --key FILE" in refused.stderr


def test_keys_and_signatures_are_the_standard_ones(
    signed: Path, key: Path, public_key: Path, tmp_path: Path
) -> None:
    """OpenSSL writes our public key, and proves our signature over DSSE's encoding."""
    raw = json.loads(signing.signature_path(signed, "minilm", 1).read_text())
    openssl = shutil.which("openssl")
    assert openssl, "wanted: the command openssl, which Debian installs with ca-certificates"
    written = subprocess.run(
        [openssl, "pkey", "-in", key, "-pubout"], capture_output=True, check=True
    ).stdout
    assert written == public_key.read_bytes()
    from base64 import b64decode

    payload, kind = b64decode(raw["payload"]), raw["payloadType"].encode()
    (tmp_path / "message").write_bytes(
        b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)
    )
    (tmp_path / "signature").write_bytes(b64decode(raw["signatures"][0]["sig"]))
    proved = subprocess.run(
        [
            *(openssl, "pkeyutl", "-verify", "-pubin", "-inkey", public_key, "-rawin"),
            *("-in", tmp_path / "message", "-sigfile", tmp_path / "signature"),
        ],
        capture_output=True,
        text=True,
    )
    assert "Signature Verified Successfully" in proved.stdout, proved.stderr
    assert json.loads(payload)["_type"] == signing.STATEMENT_TYPE


def test_keys_of_openssl_and_other_kinds_sign_too(repository: Path, tmp_path: Path) -> None:
    for kind, options in (
        ("EC", ["-pkeyopt", "ec_paramgen_curve:P-256"]),
        ("ED25519", []),
        ("RSA", ["-pkeyopt", "rsa_keygen_bits:2048"]),
    ):
        key, public = tmp_path / kind, tmp_path / f"{kind}.pub"
        subprocess.run(
            ["openssl", "genpkey", "-quiet", "-algorithm", kind, *options, "-out", key], check=True
        )
        key.chmod(0o600)
        subprocess.run(["openssl", "pkey", "-in", key, "-pubout", "-out", public], check=True)
        signing.sign(repository, "minilm", 1, key)
        assert check(repository, public).version == pins.live(repository, "minilm")
