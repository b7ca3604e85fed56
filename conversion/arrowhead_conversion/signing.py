# SPDX-License-Identifier: Apache-2.0
"""Signatures: who made a version. Checksums say that files are whole; anybody can write those.

`<name>_encoder/<version>/signature.json` is an in-toto statement in a DSSE envelope
(https://github.com/secure-systems-lab/dsse). It lists with their SHA-256 all files of the version,
code included, what lies beside the version folders for Triton (`warmup`), and of each of the three
`config.pbtxt` what `arrowhead promote`, `rollback` and `configure` do not set. docs/format.md tells
which those are.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from google.protobuf import text_format
from google.protobuf.json_format import MessageToDict
from securesystemslib.dsse import Envelope
from securesystemslib.exceptions import VerificationError
from securesystemslib.signer import CryptoSigner, SSlibKey  # type: ignore[attr-defined]

from arrowhead_conversion import files, pins
from arrowhead_conversion.errors import BadKey, BadSignature, RegistryError
from arrowhead_conversion.repository import CANDIDATE, PARTS, check_name, locked
from arrowhead_conversion.settings import WARMUP, scheduling

SIGNATURE = "signature.json"  # in the version's folder of the encoder
PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "urn:arrowhead:model-version:1"

_BLOCK = 1 << 20
_OF_THE_VERSION = ("compute_dtype", pins.PREVIOUS, pins.HIGHEST)  # parameters that commands set

Progress = Callable[[int], object]


@dataclass(frozen=True)
class Statement:
    """What a signature says of a version.

    Attributes:
        name, version: of the model.
        files: SHA-256 in hexadecimal and size in bytes of each file, by its path in the repository.
        configurations: SHA-256 of what is signed of a `config.pbtxt`, by the name of its folder.
    """

    name: str
    version: int
    files: Mapping[str, tuple[str, int]]
    configurations: Mapping[str, str]

    def payload(self) -> bytes:
        """As an in-toto statement."""
        subject = [
            {"name": name, "digest": {"sha256": digest}, "annotations": {"size": size}}
            for name, (digest, size) in self.files.items()
        ]
        predicate = {
            "name": self.name,
            "version": self.version,
            "configurations": dict(self.configurations),
        }
        statement = {
            "_type": STATEMENT_TYPE,
            "subject": subject,
            "predicateType": PREDICATE_TYPE,
            "predicate": predicate,
        }
        return json.dumps(statement, sort_keys=True).encode()

    @classmethod
    def parse(cls, payload: bytes) -> Statement:
        """Inverse of `payload`.

        Raises:
            ValueError: it is not one of ours.
        """
        raw = json.loads(payload)
        try:
            if (raw["_type"], raw["predicateType"]) != (STATEMENT_TYPE, PREDICATE_TYPE):
                raise ValueError(f"it is about {raw['predicateType']!r}, not {PREDICATE_TYPE!r}")
            listed = {
                str(one["name"]): (str(one["digest"]["sha256"]), int(one["annotations"]["size"]))
                for one in raw["subject"]
            }
            said = raw["predicate"]
            return cls(said["name"], said["version"], listed, dict(said["configurations"]))
        except (KeyError, TypeError) as error:
            raise ValueError(f"it is no statement about a version ({error!r})") from error


def new_key(path: Path) -> Path:
    """Makes an Ed25519 key: the private one at `path`, for its owner alone; gives the public one's.

    Raises:
        BadKey: a file is there already, or it cannot be written.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    key = Ed25519PrivateKey.generate()
    public_raw = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    public = path.with_name(f"{path.name}.pub")
    if public.exists():
        raise BadKey(f"{public} is there already; name another file")
    try:
        _write_new(path, CryptoSigner(key).private_bytes, 0o600)
        _write_new(public, public_raw, 0o644)
    except FileExistsError as error:
        raise BadKey(f"{error.filename} is there already; name another file") from error
    except OSError as error:
        raise BadKey(f"cannot write {error.filename}: {error.strerror}") from error
    return public


def read_public_key(path: Path) -> SSlibKey:
    """A public key in PEM, as `arrowhead sign --new-key` and `openssl pkey -pubout` write it.

    Raises:
        BadKey: it cannot be read, is of a kind that is not known, or others may change it.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    raw = _key_file(path, 0o022, "can be changed by others", 644)
    try:
        return SSlibKey.from_crypto(load_pem_public_key(raw))
    except (ValueError, UnsupportedAlgorithm) as error:
        raise BadKey(
            f"{path} is no public key in PEM ({error}); `arrowhead sign --new-key` makes a pair, "
            "`openssl pkey -in KEY -pubout` writes the public one of a private one"
        ) from error


def sign(
    repository: Path,
    name: str,
    version: int | None,
    key: Path,
    progress: Progress = lambda _: None,
) -> tuple[int, str]:
    """Signs a version as it is on disk now; what was signed before is replaced.

    Args:
        repository: the Triton model repository.
        name: of the model.
        version: which one; None is the live one.
        key: file of the private key, in PEM; Ed25519, ECDSA or RSA.
        progress: called with how many more bytes were read.

    Returns:
        the version, and the id of the key.

    Raises:
        BadKey: the key cannot be read, or others can.
        RegistryError: no such model or version.
        BadSignature: one of the version's files cannot be signed.
    """
    signer = _read_private_key(key)
    check_name(name)
    with locked(repository, name):
        known = pins.versions(repository, name)
        version = version or pins.live(repository, name)
        if version not in known:
            raise RegistryError(
                f"{repository} holds no {name!r}{f' version {version}' if version else ''}; "
                f"versions there: {', '.join(map(str, known)) or 'none'}"
            )
        read = {}
        for path in sorted(_files(repository, name, version)):
            read[path] = _read(repository / path, progress=progress)
        configurations = {
            f"{name}{part}": config_sha256(_text(repository / f"{name}{part}"), name)
            for part in PARTS
        }
        statement = Statement(name, version, read, configurations)
        envelope = Envelope(statement.payload(), PAYLOAD_TYPE, {})
        made = envelope.sign(signer)
        text = json.dumps(envelope.to_dict(), indent=2) + "\n"
        pins.put(signature_path(repository, name, version), text)
        return version, made.keyid


def signature_path(repository: Path, name: str, version: int) -> Path:
    """Where the signature of a version is."""
    return repository / f"{name}_encoder" / str(version) / SIGNATURE


def check(
    repository: Path,
    name: str,
    version: int,
    key: SSlibKey,
    copy: Path | None = None,
    progress: Progress = lambda _: None,
) -> Statement:
    """Proves that the holder of the private key signed a version, and that its files are those.

    Args:
        repository: the Triton model repository.
        name: of the model.
        version: of it.
        key: the public key.
        copy: a new folder for a copy of what is signed, and of that alone: the very bytes that were
            compared, whatever becomes of the repository. None only compares.
        progress: called with how many more bytes were read.

    Raises:
        BadSignature: names the file, and says what to do.
    """
    statement = _proved(repository, key, name, version)
    for part in PARTS:
        folder = f"{name}{part}"
        text = _text(repository / folder)
        check_config(statement, folder, text)
        if copy is not None:
            (copy / folder).mkdir(parents=True, mode=0o700)
            (copy / folder / "config.pbtxt").write_text(text, encoding="utf-8")
    for file, (digest, size) in statement.files.items():
        target = None if copy is None else copy / file
        if target is not None:
            target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        met = _read(repository / file, copy=target, most=size, progress=progress)
        if met != (digest, size):
            raise BadSignature(
                f"{repository / file} is not the file that was signed; put that back, or look into "
                f"the change and sign anew: {_how(name, version)}"
            )
    return statement


def check_config(statement: Statement, folder: str, text: str) -> None:
    """Proves that a `config.pbtxt` says what was signed, but for what our commands set.

    Args:
        statement: the proved one.
        folder: its folder in the repository; that of a candidate is held against its model's.
        text: what stands in it.

    Raises:
        BadSignature: it says something else.
    """
    base = folder.removesuffix(CANDIDATE)
    if config_sha256(text, statement.name) != statement.configurations.get(base):
        raise BadSignature(
            f"{folder}/config.pbtxt is not what was signed, and not by `arrowhead promote`, "
            "`rollback` or `configure`; put it back, or look into the change and sign anew: "
            f"{_how(statement.name, statement.version)}"
        )


def config_sha256(text: str, name: str) -> str:
    """SHA-256 of what is signed of a `config.pbtxt`: its meaning, without what our commands set.

    Raises:
        BadSignature: Triton could not read it.
    """
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    try:
        config = text_format.Parse(text, ModelConfig())
        known = [
            text_format.Parse(scheduling(name, 1, steps), ModelConfig())
            for steps in ("two-step", "fused")
        ]
    except text_format.ParseError as error:
        raise BadSignature(f"a config.pbtxt of {name} cannot be read: {error}") from error
    for one in (config, *known):
        for step in one.ensemble_scheduling.step:
            step.model_version = 0
    for field in ("name", "version_policy", "instance_group"):
        config.ClearField(field)
    for parameter in list(config.parameters):
        if parameter in _OF_THE_VERSION or parameter.startswith("prompt."):
            del config.parameters[parameter]
    # As a name alone it would let in any other file, and any number of requests.
    ours = text_format.Parse(WARMUP, ModelConfig()).model_warmup[0]
    warmups = [warmup for warmup in config.model_warmup if warmup != ours]
    config.ClearField("model_warmup")
    config.model_warmup.extend(warmups)
    if config.ensemble_scheduling in [one.ensemble_scheduling for one in known]:
        config.ensemble_scheduling.CopyFrom(known[0].ensemble_scheduling)
    # Not the serialized message, which protobuf promises to no two of its releases alike.
    said = json.dumps(MessageToDict(config, preserving_proto_field_name=True), sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()


def read_signature(repository: Path, name: str, version: int) -> bytes:
    """The signature of a version as it lies there, not proved.

    Raises:
        BadSignature: there is none.
    """
    path = signature_path(repository, name, version)
    try:
        return files.read(path)
    except FileNotFoundError as error:
        raise BadSignature(
            f"{name} version {version} is not signed ({path} is missing); sign it with "
            f"{_how(name, version)}"
        ) from error
    except OSError as error:
        raise BadSignature(f"{path} cannot be read: {error.strerror}") from error


def _proved(repository: Path, key: SSlibKey, name: str, version: int) -> Statement:
    """What a signature says, after it was held against the key."""
    path = signature_path(repository, name, version)
    raw = read_signature(repository, name, version)
    try:
        envelope = Envelope.from_dict(json.loads(raw))
        envelope.verify([key], threshold=1)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadSignature(
            f"{path} is no signature ({error}); sign anew: {_how(name, version)}"
        ) from error
    except VerificationError as error:
        signers = ", ".join(signer[:16] for signer in envelope.signatures) or "nobody"
        raise BadSignature(
            f"{path} was not signed with the key {key.keyid[:16]} (but by {signers}), or was "
            f"changed; check --public-key, or sign anew: {_how(name, version)}"
        ) from error
    try:
        if envelope.payload_type != PAYLOAD_TYPE:
            raise ValueError(f"its payload is {envelope.payload_type!r}")
        statement = Statement.parse(envelope.payload)
    except ValueError as error:
        raise BadSignature(f"{path}: {error}; sign anew: {_how(name, version)}") from error
    if (statement.name, statement.version) != (name, version):
        raise BadSignature(
            f"{path} is the signature of {statement.name} version {statement.version}; "
            f"sign this one: {_how(name, version)}"
        )
    for file in statement.files:
        _check_path(path, file, name, version)
    return statement


def _how(name: str, version: int) -> str:
    return f"`arrowhead sign {name} --version {version} --key FILE`"


def _files(repository: Path, name: str, version: int) -> Iterator[str]:
    """What is signed of both parts: the version's files, and what lies beside the versions."""
    for part in PARTS:
        if not part:
            continue  # an ensemble has no files but its configuration
        folder = repository / f"{name}{part}"
        for file in (folder / str(version)).iterdir():
            if file.is_file() and not file.name.startswith(".") and file.name != SIGNATURE:
                yield str(PurePosixPath(f"{name}{part}", str(version), file.name))
        for file in files.beside(folder):
            yield str(PurePosixPath(f"{name}{part}", *file.relative_to(folder).parts))


def _check_path(path: Path, file: str, name: str, version: int) -> None:
    """Refuses what a version has no business with, whoever signed it."""
    parts = PurePosixPath(file).parts
    inside = len(parts) >= 3 and parts[0] in (f"{name}_tokenizer", f"{name}_encoder")
    if not inside or ".." in parts or (parts[1].isdecimal() and parts[1] != str(version)):
        raise BadSignature(f"{path} names {file!r}, which is no file of {name} version {version}")


def _text(folder: Path) -> str:
    """A `config.pbtxt`, read once: what is checked is what is used."""
    path = folder / "config.pbtxt"
    try:
        return files.text(path)
    except (OSError, ValueError) as error:
        raise BadSignature(f"{path} cannot be read: {error}") from error


def _read(
    path: Path,
    *,
    copy: Path | None = None,
    most: int | None = None,
    progress: Progress = lambda _: None,
) -> tuple[str, int]:
    """SHA-256 and size of a file, and a copy of the very bytes; no more of it than `most` + 1."""
    digest, size = hashlib.sha256(), 0
    try:
        with files.opened(path) as file, (copy or Path(os.devnull)).open("wb") as target:
            while block := file.read(_BLOCK):
                size += len(block)
                digest.update(block)
                if most is not None and size > most:
                    break
                if copy is not None:
                    target.write(block)
                progress(len(block))
    except OSError as error:
        raise BadSignature(f"{error.filename or path}: {error.strerror}") from error
    return digest.hexdigest(), size


def _read_private_key(path: Path) -> CryptoSigner:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    raw = _key_file(path, 0o077, "is open to others", 600)
    try:
        return CryptoSigner(load_pem_private_key(raw, None))
    except (TypeError, ValueError, UnsupportedAlgorithm) as error:
        raise BadKey(
            f"{path} is no private key in PEM without a passphrase ({type(error).__name__}); "
            "`arrowhead sign --new-key FILE` makes one"
        ) from error


def _key_file(path: Path, closed: int, met: str, wanted: int) -> bytes:
    """What stands in a key's file, which others have no hand in."""
    try:
        with files.opened(path) as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            if mode & closed:
                raise BadKey(
                    f"{path} {met} (mode {mode:03o}); wanted {wanted}: chmod {wanted} {path}"
                )
            return files.taken(file, path)
    except OSError as error:
        raise BadKey(f"cannot read the key {path}: {error.strerror}") from error


def _write_new(path: Path, raw: bytes, mode: int) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    with os.fdopen(handle, "wb") as file:
        file.write(raw)
