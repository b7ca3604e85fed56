# SPDX-License-Identifier: Apache-2.0
"""What a model repository holds, read from its folders and a few facts of each `config.pbtxt`.

The facts are picked out by pattern: a real text-format parser comes with tritonclient, whose import
costs as much as the whole start of Triton (0.5 s), and what is wanted is two numbers and a name.
How the file says which version is live is told in `arrowhead_conversion/pins.py`.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path

from arrowhead_conversion import files, pins
from arrowhead_server.errors import RepositoryError

# Brackets are optional in the text format, colons before braces too.
_OUTPUT_WIDTH = re.compile(r"\boutput\s*:?\s*\[?\s*\{[^}]*\bdims\s*:\s*\[?\s*(\d+)")


CANDIDATE = pins.CANDIDATE
# Both parts of a version, (base, version): what is loaded, proved, refused and freed together.
Pair = tuple[str, int]


@dataclass(frozen=True)
class EmbeddingModel:
    """The ensemble `name` over one version of `base_tokenizer` and `base_encoder`.

    Attributes:
        name: what callers ask for.
        dimension: floats of a vector.
        version: of its parts, and of the ensemble itself.
        base: how its parts' names begin: `name`, except of a candidate, which shares them.
    """

    name: str
    dimension: int
    version: int
    base: str

    @property
    def tokenizer(self) -> str:
        """The name of the model that turns text into ids."""
        return f"{self.base}_tokenizer"

    @property
    def encoder(self) -> str:
        """The name of the model that turns ids into vectors."""
        return f"{self.base}_encoder"

    @property
    def pair(self) -> Pair:
        """Both its parts at its version."""
        return self.base, self.version

    @property
    def parts(self) -> tuple[str, str]:
        """Tokenizer and encoder."""
        return self.tokenizer, self.encoder


def read_repository(repository: Path) -> tuple[EmbeddingModel, ...]:
    """The embedding models in `repository`, sorted by name, each with its live version.

    That is the version its ensemble's steps are pinned to; where they are not (`-1`), the newest.

    Raises:
        RepositoryError: No such folder, no ensemble in it, or an encoder without weights.
    """
    models, faults = look_through(repository)
    for fault in faults.values():
        raise fault
    return models


def look_through(
    repository: Path,
) -> tuple[tuple[EmbeddingModel, ...], dict[str, RepositoryError]]:
    """The same, but for the models that cannot be served: their names, and why.

    Raises:
        RepositoryError: No such folder, or no ensemble in it.
    """
    if not repository.is_dir():
        raise RepositoryError(
            f"no model repository at {repository}: name one with --repository DIR, or make one "
            f"with `arrowhead convert SOURCE --name NAME --repository {repository}`"
        )
    models: list[EmbeddingModel] = []
    faults: dict[str, RepositoryError] = {}
    # What is hidden is being written, or removed.
    for config in sorted(repository.glob("[!.]*/config.pbtxt")):
        try:
            model = _embedding_model(repository, config)
        except RepositoryError as error:
            faults[config.parent.name] = error
        except (OSError, ValueError) as error:  # removed meanwhile, not ours to read, no UTF-8
            why = getattr(error, "strerror", None) or error
            faults[config.parent.name] = RepositoryError(f"{config} cannot be read: {why}")
        else:
            models += [model] if model is not None else []
    if not models and not faults:
        raise RepositoryError(
            f"{repository} holds no embedding model: make one with "
            f"`arrowhead convert SOURCE --name NAME --repository {repository}`"
        )
    return tuple(models), faults


def _embedding_model(repository: Path, config: Path) -> EmbeddingModel | None:
    text = files.text(config)
    if "ensemble" not in pins.strings(text, "platform"):
        return None
    name = config.parent.name
    width = _OUTPUT_WIDTH.search(pins.masked(text))
    steps = pins.strings(text, "model_name")
    base = next((s.removesuffix("_encoder") for s in steps if s.endswith("_encoder")), None)
    if width is None or base is None:
        what = "no output of one fixed width" if width is None else "no step through an encoder"
        raise RepositoryError(
            f"{config} declares {what}: write the model's folders again "
            f"with `arrowhead convert SOURCE --name {name}`"
        )
    pinned = pins.pins(text) or {-1}
    if len(pinned) > 1:
        met = ", ".join(map(str, sorted(pinned)))
        raise RepositoryError(
            f"{config} pins its steps to different versions ({met}): run `arrowhead promote {name}`"
        )
    model = EmbeddingModel(name, int(width[1]), pinned.pop(), base)
    _check_parts(repository, model)
    if model.version == -1:
        model = replace(model, version=_newest(repository, model))
    _check_weights(repository, model)
    return model


def _check_parts(repository: Path, model: EmbeddingModel) -> None:
    for part in model.parts:
        if not (repository / part / "config.pbtxt").is_file():
            raise RepositoryError(
                f"model '{model.name}' needs '{part}', which {repository} does not hold: "
                f"write it with `arrowhead convert SOURCE --name {model.base}`"
            )


def _newest(repository: Path, model: EmbeddingModel) -> int:
    newest = {
        part: max(
            (
                int(folder.name)
                for folder in (repository / part).iterdir()
                if folder.is_dir() and folder.name.isdecimal()
            ),
            default=1,
        )
        for part in (model.name, *model.parts)
    }
    # Without pins Triton serves the highest version of each, so a conversion killed while it
    # published would put a new tokenizer before an old encoder.
    if len(set(newest.values())) > 1:
        met = ", ".join(f"{part} {version}" for part, version in newest.items())
        raise RepositoryError(
            f"model '{model.name}' has parts of unequal version ({met}): "
            f"run `arrowhead convert SOURCE --name {model.name}` again"
        )
    return newest[model.encoder]


def _check_weights(repository: Path, model: EmbeddingModel) -> None:
    weights = repository / model.encoder / str(model.version) / "weights.parquet"
    if not weights.is_file():
        raise RepositoryError(
            f"model '{model.name}' has no weights yet ({weights} is missing): "
            f"run `arrowhead convert SOURCE --name {model.base}` first"
        )
    if not (repository / model.tokenizer / str(model.version)).is_dir():
        raise RepositoryError(
            f"model '{model.name}' has no version {model.version} of '{model.tokenizer}': "
            f"run `arrowhead rollback {model.base}`, or convert it again"
        )
