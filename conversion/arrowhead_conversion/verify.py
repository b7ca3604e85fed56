# SPDX-License-Identifier: Apache-2.0
"""Proves a converted model again: what the server checks at load, then the whole comparison."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from arrowhead_conversion import certificate, pins, pipeline, signing, sources
from arrowhead_conversion.errors import NotFaithful, SourceNotFound
from arrowhead_conversion.weights import Storage
from arrowhead_engine.encoder import Encoder
from arrowhead_engine.spec import Certificate, ModelSpec
from arrowhead_engine.tokenizer import Tokenizer
from arrowhead_engine.weightfile import WeightFile


@dataclass(frozen=True)
class Verified:
    """A model that is what its certificate says.

    Attributes:
        name, version: of the model.
        recorded: the certificate it carries.
        recomputed: the same made anew, here; None if the source is not to be had.
        missing: why it is not.
    """

    name: str
    version: int
    recorded: Certificate
    recomputed: Certificate | None
    missing: str


def verify(
    name: str,
    repository_path: Path,
    *,
    version: int | None = None,
    source: str | None = None,
    public_key: Path | None = None,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Verified:
    """Proves the model `name`, and compares it with its source anew if that can be found.

    Args:
        name: a model in the repository.
        repository_path: the Triton model repository.
        version: which version; None is the live one.
        source: where the source is now, if not where it was converted from.
        public_key: file of the key that must have signed it; None asks for no signature.
        progress: called with how many texts were compared, and of how many.

    Raises:
        SourceNotFound: no such model; or `source` was named and is not there.
        BadKey: the public key cannot be used.
        BadSignature: it was not signed with that key, or a file is not the one that was.
        EngineError: a file was changed or damaged, or this machine computes other vectors.
        NotFaithful: the source's vectors, tokenizer or pipeline are others than the certified.
    """
    known = pins.versions(repository_path, name)
    if not known or (version is not None and version not in known):
        raise SourceNotFound(
            f"{repository_path} holds no {name!r}{f' version {version}' if version else ''}; "
            f"versions there: {', '.join(map(str, known)) or 'none'}"
        )
    version = version or pins.live(repository_path, name) or known[-1]
    if public_key is not None:
        signing.check(repository_path, name, version, signing.read_public_key(public_key))
    weights = repository_path / f"{name}_encoder" / str(version) / "weights.parquet"
    tokenizer_folder = repository_path / f"{name}_tokenizer" / str(version)
    Tokenizer.open(tokenizer_folder)
    Encoder.open(weights, device="cpu", dtype="float32").verify()
    with WeightFile.open(weights) as file:
        spec = ModelSpec.from_metadata(file.metadata)
        recorded = Certificate.from_metadata(file.metadata)
        storage: Storage = file.main_dtype  # type: ignore[assignment]  # one of its four
    try:
        folder = sources.locate(source or spec.source.get("name", ""), spec.source.get("revision"))
    except SourceNotFound as error:
        if source is not None:
            raise
        return Verified(name, version, recorded, None, str(error))
    tokenizer = (tokenizer_folder / "tokenizer.json").read_bytes()
    model = _described(folder, spec, tokenizer)
    total, done = len(certificate.cases(spec)), 0

    def one_more(_: int) -> None:
        nonlocal done
        done += 1
        progress(done, total)

    again = certificate.certify(model, weights, tokenizer, storage, one_more)
    return Verified(name, version, recorded, again, "")


def _described(folder: Path, spec: ModelSpec, tokenizer: bytes) -> pipeline.Described:
    """The source as it is now, which must still be what was converted."""
    says_itself = (folder / "modules.json").is_file()
    choices = pipeline.Choices(
        pooling=None if says_itself else spec.pooling,
        normalize=None if says_itself else spec.normalize,
        max_seq_length=spec.max_seq_length,
    )
    model = pipeline.describe(folder, spec.source.get("name", ""), None, choices)
    if (model.network / "tokenizer.json").read_bytes() != tokenizer:
        raise NotFaithful(f"{folder}: its tokenizer is not the one that was converted")
    now = replace(pipeline.exclude_prompts(model.spec, tokenizer), source=spec.source)
    for field in ("architecture", "config", "pooling", "heads", "normalize", "prompts"):
        if getattr(now, field) != getattr(spec, field):
            raise NotFaithful(
                f"{folder}: its {field} is {getattr(now, field)!r}, {getattr(spec, field)!r} was "
                "converted; convert it again"
            )
    return replace(model, spec=spec)
