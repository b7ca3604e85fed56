# SPDX-License-Identifier: Apache-2.0
"""What a user names -> a folder with the model's files.

A source is, in this order: a local folder; an installed Python package that carries a model; a
model on the HuggingFace hub. Nothing of the source is ever executed.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from arrowhead_conversion.errors import SourceNotFound

# Of a hub repository: descriptions, tokenizer and safetensors. No code.
HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model"]
# Of one that has no safetensors in some place, besides: PyTorch's files of tensors (weights.py).
PICKLED_FILES = ["pytorch_model*.bin", "*/pytorch_model*.bin"]


def locate(source: str, revision: str | None = None) -> Path:
    """The folder with the source's files, downloaded first if it is on the hub.

    Raises:
        SourceNotFound: says what was looked for, where, and what to do.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        if not any((folder / name).is_file() for name in ("config.json", "modules.json")):
            raise SourceNotFound(
                f"{source}: has neither config.json nor modules.json; name the folder of a model"
            )
        return folder
    if re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", source):
        package = _in_package(source)
        if package is not None:
            return package
    if folder.is_absolute() or source.startswith((".", "~")):
        raise SourceNotFound(f"{source}: no such folder")
    return _from_hub(source, revision)


def _in_package(name: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(name)  # finds the package; runs none of its code
    except (ImportError, ValueError):
        return None
    if spec is None or not spec.submodule_search_locations:
        return None
    root = Path(next(iter(spec.submodule_search_locations)))
    models = sorted(path.parent for path in root.rglob("modules.json"))
    if len(models) != 1:
        found = ", ".join(str(path.relative_to(root)) for path in models) or "none"
        raise SourceNotFound(
            f"{name}: an installed package with {len(models)} models in it ({found}); "
            "name the model's folder instead"
        )
    return models[0]


def _from_hub(repo_id: str, revision: str | None) -> Path:
    named = f"{repo_id}{f' at {revision}' if revision else ''}"
    try:
        folder = Path(
            huggingface_hub.snapshot_download(repo_id, revision=revision, allow_patterns=HUB_FILES)
        )
        if _lacks_safetensors(folder):
            # Of the very commit that the first answer was of: the folder is named after it.
            huggingface_hub.snapshot_download(
                repo_id, revision=folder.name, allow_patterns=PICKLED_FILES
            )
        return folder
    except HFValidationError as error:
        raise SourceNotFound(
            f"{repo_id}: no such folder or installed package, and not the id of a hub model "
            "(owner/name)"
        ) from error
    except GatedRepoError as error:
        raise SourceNotFound(
            f"{named}: the hub wants its terms accepted first, on its page; then set HF_TOKEN "
            "or run `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise SourceNotFound(f"{named}: the hub has this model, but no such revision") from error
    except RepositoryNotFoundError as error:
        raise SourceNotFound(
            f"{named}: no such folder, package or hub model (a private one needs HF_TOKEN)"
        ) from error
    except (LocalEntryNotFoundError, OSError, HfHubHTTPError) as error:
        raise SourceNotFound(
            f"{named}: no such folder or package, not in the hub cache, and the hub cannot be "
            f"reached ({_reason(error)}); copy the model's folder here and name that"
        ) from error


def _lacks_safetensors(folder: Path) -> bool:
    """Whether the network, or a dense head beside it, has its weights in another form."""
    heads = (path.parent for path in folder.glob("*_Dense/config.json"))
    return any(not any(place.glob("*.safetensors")) for place in (folder, *heads))


def _reason(error: BaseException) -> str:
    """The first line of the innermost cause, which names the network's fault."""
    while error.__cause__ is not None or error.__context__ is not None:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
