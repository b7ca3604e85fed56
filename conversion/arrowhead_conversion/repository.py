# SPDX-License-Identifier: Apache-2.0
"""A Triton model repository entry: `<name>`, `<name>_tokenizer` and `<name>_encoder`.

The three Triton models of `minilm` are the template for every other model: its `model.py` files are
copied, its `config.pbtxt` files rewritten with the new name and width.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from arrowhead_conversion import pins
from arrowhead_conversion.errors import Busy, InvalidName, UnsupportedSource

TEMPLATE = "minilm"
WIDTH = "dims: [ 384 ]"  # of the template's embeddings
# Published in this order: callers, and `arrowhead serve`, come in through the ensemble.
PARTS = ("_tokenizer", "_encoder", "")
CANDIDATE = pins.CANDIDATE
RESERVED = ("_tokenizer", "_encoder", CANDIDATE)
WARMUP_TOKENS = 16


def check_name(name: str) -> None:
    """Refuses what is not a model's name, or would be written outside the repository.

    Raises:
        InvalidName: says what a name looks like.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name) or name.endswith(RESERVED):
        raise InvalidName(
            f"{name!r} is not a model name: up to 64 letters, digits, '.', '_' or '-', beginning "
            f"with a letter or digit, and not ending in {', '.join(RESERVED)}"
        )


@contextmanager
def staged(
    repository: Path,
    name: str,
    dimension: int,
    prompts: Mapping[str, str],
    *,
    promote: bool = True,
) -> Iterator[tuple[dict[str, Path], int]]:
    """Three hidden version folders to fill; when the block ends well, they become the next version.

    Yields the folder for each of `PARTS`, the model code already in it, and the version's number.
    Each folder appears whole, by a rename. It is served once the configurations name it, which are
    written last: who is killed before that leaves what was served as it was.

    Args:
        repository: the Triton model repository.
        name: of the model.
        dimension: D.
        prompts: of the model, by name.
        promote: whether the new version becomes the live one; a first version always does.

    Raises:
        Busy: another conversion to this name is at work.
        UnsupportedSource: the name is in use for embeddings of another width.
    """
    folders = {part: repository / f"{name}{part}" for part in PARTS}
    with locked(repository, name):
        _check_width(folders, dimension)
        is_first = not pins.versions(repository, name)
        # No number is given out twice: a server may still hold vectors of the removed one.
        version = pins.highest(repository, name) + 1
        stages = {part: folder / ".staging" for part, folder in folders.items()}
        try:
            for part, stage in stages.items():
                shutil.rmtree(stage, ignore_errors=True)  # of a conversion that was killed
                stage.mkdir(parents=True)
                # An ensemble has no code; git keeps its version folder by an empty file.
                file = "model.py" if part else ".gitkeep"
                shutil.copyfile(template() / f"{TEMPLATE}{part}" / "1" / file, stage / file)
            yield stages, version
            for part, stage in stages.items():
                if part == "_encoder":
                    _write_warmup(folders[part] / "warmup")
                _publish(stage, folders[part] / str(version))
            if promote or is_first:
                make_live(repository, name, version, dimension=dimension, prompts=prompts)
        finally:
            for stage in stages.values():
                shutil.rmtree(stage, ignore_errors=True)
            for folder in folders.values():
                with suppress(OSError):  # not empty: as it should be
                    folder.rmdir()


@contextmanager
def locked(repository: Path, name: str) -> Iterator[None]:
    """Nobody else changes the model meanwhile.

    Raises:
        Busy: somebody does already.
    """
    folder = repository / f"{name}_encoder"
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Busy(f"another conversion to {name!r} is at work; wait for it") from None
        yield
    finally:
        os.close(handle)  # gives the lock back, as does the death of the process


def _check_width(folders: dict[str, Path], dimension: int) -> None:
    for folder in folders.values():
        path = folder / "config.pbtxt"
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        met = re.search(r'"embeddings"[^}]*?\bdims\s*:\s*\[?\s*(\d+)', text)
        if met and int(met[1]) != dimension:
            raise UnsupportedSource(
                f"{path} is for embeddings of {met[1]} dimensions, this model's have {dimension}; "
                "choose another name"
            )


def _publish(stage: Path, target: Path) -> None:
    """The staged version, whole; into what git holds of minilm or a kill left, file by file."""
    if not target.exists():
        stage.rename(target)
        return
    for file in sorted(stage.iterdir(), key=lambda file: file.suffix == ".parquet"):
        file.replace(target / file.name)


def template() -> Path:
    """Where minilm's Triton models are: in the installed package, or in the source tree."""
    packaged = Path(__file__).parent / "model_repository"
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / "model_repository"


def make_live(
    repository: Path,
    name: str,
    version: int,
    *,
    dimension: int,
    prompts: Mapping[str, str],
    previous: int | None = None,
) -> None:
    """Names a version in the three configurations, each of which is replaced whole.

    What the ensemble's steps are pinned to is what is served. Its parts serve the old version and
    the new until it has changed, so that a Triton that starts in between, or after this was killed,
    finds what it needs. The files of a new model are made from the template's; others keep what
    their owner wrote into them.

    Args:
        repository: the Triton model repository.
        name: of the model.
        version: the one that is to be live; its folders are there.
        dimension: D.
        prompts: by name; kept in the ensemble's parameters, where clients look them up.
        previous: the version to go back to; None is the one that is live now, if there is one.
    """
    if previous is None:
        previous = pins.live(repository, name)
    highest = pins.highest(repository, name)
    for part in PARTS:
        folder = repository / f"{name}{part}"
        text = _config(folder / "config.pbtxt", name, part, dimension)
        if part:
            text = pins.with_versions(text, sorted({version, *_in_use(repository, name)}))
        else:
            text = pins.with_versions(pins.with_pin(text, version), [version])
            facts = {f"prompt.{key}": prompt for key, prompt in prompts.items()}
            if previous and previous != version:
                facts[pins.PREVIOUS] = str(previous)
            if highest > version:
                facts[pins.HIGHEST] = str(highest)
            text = pins.with_facts(text, facts)
        pins.replace(folder / "config.pbtxt", text)
    serve_parts(repository, name)


def serve_parts(repository: Path, name: str, *also: int) -> None:
    """Names in both parts' configurations the versions that an ensemble uses, and these."""
    for part in ("_tokenizer", "_encoder"):
        path = repository / f"{name}{part}" / "config.pbtxt"
        text = path.read_text(encoding="utf-8")
        pins.replace(path, pins.with_versions(text, sorted({*also, *_in_use(repository, name)})))


def _in_use(repository: Path, name: str) -> set[int]:
    """The live version, and the candidate's."""
    used = pins.live(repository, name), pins.pin(repository / f"{name}{CANDIDATE}")
    return {version for version in used if version is not None}


def _config(path: Path, name: str, part: str, dimension: int) -> str:
    """The configuration that is there, or the template's for this model."""
    if path.exists():  # the user's own settings, or minilm's in the source tree
        return path.read_text(encoding="utf-8")
    # As text, not as a parsed message, so that the comments that explain the settings come along.
    text = (template() / f"{TEMPLATE}{part}" / "config.pbtxt").read_text(encoding="utf-8")
    return text.replace(f'"{TEMPLATE}', f'"{name}').replace(WIDTH, f"dims: [ {dimension} ]")


def _write_warmup(folder: Path) -> None:
    """The tensors of the encoder's warm-up request: one text of `WARMUP_TOKENS` tokens."""
    if folder.is_dir():  # written anew it would be a change to a Triton that watches it
        return
    draft = folder.with_name(f".{folder.name}")
    draft.mkdir(exist_ok=True)
    np.ones(WARMUP_TOKENS, np.int32).tofile(draft / f"input_ids_{WARMUP_TOKENS}")
    np.array([WARMUP_TOKENS], np.int32).tofile(draft / f"length_{WARMUP_TOKENS}")
    draft.rename(folder)
