# SPDX-License-Identifier: Apache-2.0
"""What a model repository holds, read from the names of its folders and two facts per ensemble.

The facts are picked out of `config.pbtxt` by pattern: a real text-format parser comes with
tritonclient, whose import costs as much as the whole start of Triton (0.5 s), and the only number
wanted sizes a cache.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from arrowhead_server.errors import RepositoryError

_COMMENT = re.compile(r"#[^\n]*")
_ENSEMBLE = re.compile(r'\bplatform\s*:\s*"ensemble"')
# Brackets are optional in the text format, colons before braces too.
_OUTPUT_WIDTH = re.compile(r"\boutput\s*:?\s*\[?\s*\{[^}]*\bdims\s*:\s*\[?\s*(\d+)")


@dataclass(frozen=True)
class EmbeddingModel:
    """The ensemble `name` over `name_tokenizer` and `name_encoder`: `dimension` floats a text."""

    name: str
    dimension: int

    @property
    def tokenizer(self) -> str:
        """The name of the model that turns text into ids."""
        return f"{self.name}_tokenizer"

    @property
    def encoder(self) -> str:
        """The name of the model that turns ids into vectors."""
        return f"{self.name}_encoder"


def read_repository(repository: Path) -> tuple[EmbeddingModel, ...]:
    """The embedding models in `repository`, sorted by name.

    Raises:
        RepositoryError: No such folder, no ensemble in it, or an encoder without weights.
    """
    if not repository.is_dir():
        raise RepositoryError(
            f"no model repository at {repository}: name one with --repository DIR, or make one "
            f"with `arrowhead convert SOURCE --name NAME --repository {repository}`"
        )
    models = tuple(
        model
        for config in sorted(repository.glob("*/config.pbtxt"))
        if (model := _embedding_model(config)) is not None
    )
    if not models:
        raise RepositoryError(
            f"{repository} holds no embedding model: make one with "
            f"`arrowhead convert SOURCE --name NAME --repository {repository}`"
        )
    for model in models:
        _check_weights(repository, model)
    return models


def offer(repository: Path, folder: Path) -> None:
    """Makes `folder` what Triton is shown of the repository: a link for each model that is whole.

    A model that a conversion is still writing has no `config.pbtxt` yet; shown to Triton, it would
    keep all others from being served. And Triton's Python stubs never start on a path with a blank
    or a letter beyond ASCII in it, which this one has not.
    """
    folder.mkdir(exist_ok=True)
    for link in folder.iterdir():
        link.unlink()
    for config in repository.glob("*/config.pbtxt"):
        (folder / config.parent.name).symlink_to(config.parent)


def _embedding_model(config: Path) -> EmbeddingModel | None:
    text = _COMMENT.sub("", config.read_text(encoding="utf-8"))
    if not _ENSEMBLE.search(text):
        return None
    name = config.parent.name
    width = _OUTPUT_WIDTH.search(text)
    if width is None:
        raise RepositoryError(
            f"{config} declares no output of one fixed width: write the model's folders again "
            f"with `arrowhead convert SOURCE --name {name}`"
        )
    return EmbeddingModel(name, int(width[1]))


def _check_weights(repository: Path, model: EmbeddingModel) -> None:
    for part in (model.tokenizer, model.encoder):
        if not (repository / part / "config.pbtxt").is_file():
            raise RepositoryError(
                f"model '{model.name}' needs '{part}', which {repository} does not hold: "
                f"write it with `arrowhead convert SOURCE --name {model.name}`"
            )
    newest = {
        part: max(
            (
                int(folder.name)
                for folder in (repository / part).iterdir()
                if folder.is_dir() and folder.name.isdecimal()
            ),
            default=1,
        )
        for part in (model.name, model.tokenizer, model.encoder)
    }
    # Triton serves the highest version of each, so a conversion killed while it published would
    # put a new tokenizer before an old encoder.
    if len(set(newest.values())) > 1:
        met = ", ".join(f"{part} {version}" for part, version in newest.items())
        raise RepositoryError(
            f"model '{model.name}' has parts of unequal version ({met}): "
            f"run `arrowhead convert SOURCE --name {model.name}` again"
        )
    weights = repository / model.encoder / str(newest[model.encoder]) / "weights.parquet"
    if not weights.is_file():
        raise RepositoryError(
            f"model '{model.name}' has no weights yet ({weights} is missing): "
            f"run `arrowhead convert SOURCE --name {model.name}` first"
        )
