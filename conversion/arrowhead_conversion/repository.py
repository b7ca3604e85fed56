# SPDX-License-Identifier: Apache-2.0
"""A Triton model repository entry: `<name>`, `<name>_tokenizer` and `<name>_encoder`.

The three Triton models of `minilm` are the template for every other model: its `model.py` files are
copied, its `config.pbtxt` files rewritten with the new name and width.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from arrowhead_conversion.errors import InvalidName

TEMPLATE = "minilm"
WIDTH = "dims: [ 384 ]"  # of the template's embeddings
# Published in this order: a version whose encoder has its weights is complete.
PARTS = ("_tokenizer", "", "_encoder")
WARMUP_TOKENS = 16


def check_name(name: str) -> None:
    """Refuses what is not a model's name, or would be written outside the repository.

    Raises:
        InvalidName: says what a name looks like.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name) or name.endswith(PARTS[::2]):
        raise InvalidName(
            f"{name!r} is not a model name: up to 64 letters, digits, '.', '_' or '-', beginning "
            "with a letter or digit, and not ending in _tokenizer or _encoder"
        )


def versions(repository: Path, name: str) -> list[int]:
    """The complete versions of a model, ascending."""
    found = (repository / f"{name}_encoder").glob("*/weights.parquet")
    return sorted(int(path.parent.name) for path in found if path.parent.name.isdigit())


@contextmanager
def staged(repository: Path, name: str, dimension: int) -> Iterator[tuple[dict[str, Path], int]]:
    """Three hidden version folders to fill; when the block ends well, they become the next version.

    Yields the folder for each of `PARTS`, the model code already in it, and the version's number.
    A running server and a reader of the repository see all of a version or nothing of it.
    """
    version = max(versions(repository, name), default=0) + 1
    stages = {part: repository / f"{name}{part}" / f".staging-{os.getpid()}" for part in PARTS}
    try:
        for part, stage in stages.items():
            _remove_abandoned(stage.parent)
            stage.mkdir(parents=True)
            for file in ("model.py", ".gitkeep"):  # an ensemble's version folder is else empty
                original = template() / f"{TEMPLATE}{part}" / "1" / file
                if original.exists():
                    shutil.copyfile(original, stage / file)
        yield stages, version
        for part, stage in stages.items():
            _write_config(repository / f"{name}{part}", name, part, dimension)
            target = stage.parent / str(version)
            if target.exists():  # what git holds of minilm, or what a killed conversion left
                shutil.rmtree(target)
            stage.rename(target)
    finally:
        for stage in stages.values():
            shutil.rmtree(stage, ignore_errors=True)


def _remove_abandoned(folder: Path) -> None:
    """Removes what conversions that were killed had staged; others may be at work right now."""
    for stage in folder.glob(".staging-*"):
        try:
            os.kill(int(stage.name.rpartition("-")[2]), 0)
        except ProcessLookupError:
            shutil.rmtree(stage, ignore_errors=True)
        except PermissionError:  # alive, and somebody else's
            pass


def template() -> Path:
    """Where minilm's Triton models are: in the installed package, or in the source tree."""
    packaged = Path(__file__).parent / "model_repository"
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / "model_repository"


def _write_config(folder: Path, name: str, part: str, dimension: int) -> None:
    if part == "_encoder":
        _write_warmup(folder / "warmup")
    path = folder / "config.pbtxt"
    if path.exists():  # the user's own settings, or minilm's in the source tree
        return
    # As text, not as a parsed message, so that the comments that explain the settings come along.
    text = (template() / f"{TEMPLATE}{part}" / "config.pbtxt").read_text(encoding="utf-8")
    text = text.replace(f'"{TEMPLATE}', f'"{name}').replace(WIDTH, f"dims: [ {dimension} ]")
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _write_warmup(folder: Path) -> None:
    """The tensors of the encoder's warm-up request: one text of `WARMUP_TOKENS` tokens."""
    folder.mkdir(exist_ok=True)
    np.ones(WARMUP_TOKENS, np.int32).tofile(folder / f"input_ids_{WARMUP_TOKENS}")
    np.array([WARMUP_TOKENS], np.int32).tofile(folder / f"length_{WARMUP_TOKENS}")
