# SPDX-License-Identifier: Apache-2.0
"""The repository as a registry: what is in it, and which version of each model is served.

Nothing is kept beside the repository itself: see `pins.py`. A running `arrowhead serve` follows
every change within seconds, without losing a request (docs/architecture.md).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from arrowhead_conversion import pins, repository
from arrowhead_conversion.errors import RegistryError
from arrowhead_conversion.repository import CANDIDATE, PARTS
from arrowhead_engine.encoder import Encoder
from arrowhead_engine.spec import Certificate, ModelSpec
from arrowhead_engine.tokenizer import Tokenizer
from arrowhead_engine.weightfile import WeightFile

Role = Literal["live", "candidate", "idle"]


@dataclass(frozen=True)
class Entry:
    """One version of one model.

    Attributes:
        role: "live" is what callers of the name get, "candidate" what those of `name_candidate`
            get, "idle" is on disk only.
        dtype: how its largest tensor is stored.
        bytes: of the weight file.
        dimension: D. worst_cosine: of its certificate.
        fault: why it cannot be read, in place of all that; else empty.
    """

    name: str
    version: int
    role: Role
    dtype: str = ""
    bytes: int = 0
    dimension: int = 0
    worst_cosine: float = 0.0
    fault: str = ""


def entries(repository_path: Path) -> list[Entry]:
    """Every version of every model, by name and version.

    Raises:
        RegistryError: there is no such folder.
    """
    if not repository_path.is_dir():
        raise RegistryError(f"{repository_path}: no such folder; name one with --repository")
    names = sorted(
        folder.name.removesuffix("_encoder") for folder in repository_path.glob("[!.]*_encoder")
    )
    return [
        _entry(repository_path, name, version)
        for name in names
        for version in pins.versions(repository_path, name)
    ]


def promote(repository_path: Path, name: str, version: int | None = None) -> tuple[int, int | None]:
    """Makes a version the live one, after it was proved; a candidate becomes live so too.

    Args:
        repository_path: the Triton model repository.
        name: of the model.
        version: which one; None is the newest.

    Returns:
        the version that is live now, and the one that was.

    Raises:
        RegistryError: no such model or version.
        EngineError: the version is broken; nothing was changed.
    """
    with _known(repository_path, name) as known:
        chosen, before = known[-1] if version is None else version, pins.live(repository_path, name)
        spec = _proved(repository_path, name, chosen, known)
        if pins.pin(repository_path / f"{name}{CANDIDATE}") == chosen:
            _drop(repository_path, name)
        kept = pins.fact(repository_path, name, pins.PREVIOUS) if before == chosen else before
        _make_live(repository_path, name, chosen, spec, kept)
        return chosen, before


def propose(repository_path: Path, name: str, version: int | None = None) -> int:
    """Serves a version as `name_candidate`, beside the live one; gives its number back.

    Raises:
        RegistryError: no such model or version, or it is live already.
        EngineError: the version is broken; nothing was changed.
    """
    with _known(repository_path, name) as known:
        chosen, live = known[-1] if version is None else version, pins.live(repository_path, name)
        if chosen == live:
            raise RegistryError(f"{name} version {chosen} is live already; name another version")
        spec = _proved(repository_path, name, chosen, known)
        folder = repository_path / f"{name}{CANDIDATE}"
        text = (repository_path / name / "config.pbtxt").read_text(encoding="utf-8")
        text = pins.with_name(text, f"{name}{CANDIDATE}")
        text = pins.with_versions(pins.with_pin(text, chosen), [chosen])
        text = pins.with_facts(text, {f"prompt.{k}": p for k, p in spec.prompts.items()})
        repository.serve_parts(repository_path, name, chosen)
        # A new one appears whole.
        place = folder if folder.is_dir() else folder.with_name(f".{folder.name}")
        (place / str(chosen)).mkdir(parents=True, exist_ok=True)
        pins.replace(place / "config.pbtxt", text)
        place.rename(folder)
        repository.serve_parts(repository_path, name)  # not what was the candidate before
        return chosen


def withdraw(repository_path: Path, name: str) -> int:
    """Ends the candidacy; gives back which version it was.

    Raises:
        RegistryError: no such model, or it has no candidate.
    """
    with _known(repository_path, name):
        version = pins.pin(repository_path / f"{name}{CANDIDATE}")
        if version is None:
            raise RegistryError(f"{name} has no candidate")
        _drop(repository_path, name)
        repository.serve_parts(repository_path, name)
        return version


def rollback(repository_path: Path, name: str) -> tuple[int, int | None]:
    """Makes the version live that was live before; gives back both, as `promote` does.

    Raises:
        RegistryError: no such model, or nothing to go back to.
        EngineError: the version before is broken; nothing was changed.
    """
    with _known(repository_path, name) as known:
        before = pins.fact(repository_path, name, pins.PREVIOUS)
        live = pins.live(repository_path, name)
        if before is None:
            raise RegistryError(f"{name} version {live} is the first that was live; none before it")
        spec = _proved(repository_path, name, before, known)
        _make_live(repository_path, name, before, spec, live)
        return before, live


def remove(repository_path: Path, name: str, version: int | None = None) -> None:
    """Removes a version, or with None the whole model.

    Raises:
        RegistryError: no such model or version, or one that is served.
    """
    with _known(repository_path, name) as known:
        if version is not None:
            _check_known(name, version, known)
            for entry in entries(repository_path):
                if (entry.name, entry.version) == (name, version) and entry.role != "idle":
                    raise RegistryError(
                        f"{name} version {version} is {entry.role}; promote or withdraw first, or "
                        "remove the whole model by its name alone"
                    )
            if version == known[-1]:
                _remember(repository_path, name, version)
            for part in reversed(PARTS):
                _delete(repository_path / f"{name}{part}" / str(version))
            return
        _drop(repository_path, name)
        # The ensemble first: without it nobody is promised the parts.
        for part in reversed(PARTS):
            _delete(repository_path / f"{name}{part}")


def _entry(repository_path: Path, name: str, version: int) -> Entry:
    role: Role = "idle"
    if version == pins.live(repository_path, name):
        role = "live"
    elif version == pins.pin(repository_path / f"{name}{CANDIDATE}"):
        role = "candidate"
    path = _weights(repository_path, name, version)
    try:
        with WeightFile.open(path) as weights:
            spec = ModelSpec.from_metadata(weights.metadata)
            proof = Certificate.from_metadata(weights.metadata)
            dtype = weights.main_dtype
    except Exception as error:  # noqa: BLE001 (a list of models shows the broken ones too)
        return Entry(name, version, role, fault=str(error))
    return Entry(
        name, version, role, dtype, path.stat().st_size, spec.dimension, proof.worst_cosine
    )


@contextmanager
def _known(repository_path: Path, name: str) -> Iterator[list[int]]:
    """The versions of a model, which nobody else changes meanwhile."""
    repository.check_name(name)
    if not pins.versions(repository_path, name):
        raise RegistryError(f"{repository_path} holds no model {name!r}; see `arrowhead models`")
    with repository.locked(repository_path, name):
        yield pins.versions(repository_path, name)


def _check_known(name: str, version: int, known: list[int]) -> None:
    if version not in known:
        raise RegistryError(
            f"{name} has no version {version}; versions there: {', '.join(map(str, known))}"
        )


def _proved(repository_path: Path, name: str, version: int, known: list[int]) -> ModelSpec:
    """What a version is, after all that the server will check was checked."""
    _check_known(name, version, known)
    Tokenizer.open(repository_path / f"{name}_tokenizer" / str(version))
    encoder = Encoder.open(_weights(repository_path, name, version))
    encoder.verify()
    return encoder.spec


def _make_live(
    repository_path: Path, name: str, version: int, spec: ModelSpec, previous: int | None
) -> None:
    repository.make_live(
        repository_path,
        name,
        version,
        dimension=spec.dimension,
        prompts=spec.prompts,
        previous=previous,
    )


def _remember(repository_path: Path, name: str, highest: int) -> None:
    """Writes down that a number was given out, before its folders go."""
    path = repository_path / name / "config.pbtxt"
    text = path.read_text(encoding="utf-8")
    facts = pins.facts(text) | {pins.HIGHEST: str(highest)}
    pins.replace(path, pins.with_facts(text, facts))


def _drop(repository_path: Path, name: str) -> None:
    folder = repository_path / f"{name}{CANDIDATE}"
    if folder.is_dir():
        _delete(folder)


def _delete(folder: Path) -> None:
    """Out of sight at once, then deleted: nobody meets half of it."""
    if folder.is_dir():
        hidden = folder.with_name(f".removed-{folder.name}")
        shutil.rmtree(hidden, ignore_errors=True)
        folder.rename(hidden)
        shutil.rmtree(hidden)


def _weights(repository_path: Path, name: str, version: int) -> Path:
    return repository_path / f"{name}_encoder" / str(version) / "weights.parquet"
