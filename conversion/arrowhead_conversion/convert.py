# SPDX-License-Identifier: Apache-2.0
"""One conversion, from what the user names to an entry that Triton can serve."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

from arrowhead_conversion import certificate, pipeline, repository, sources, weights
from arrowhead_conversion.errors import SourceNotFound, UnsupportedSource
from arrowhead_engine.spec import CERTIFICATE_KEY, MODEL_KEY, Certificate, ModelSpec, write_metadata
from arrowhead_engine.tokenizer import Tokenizer
from arrowhead_engine.weightfile import Tensor, WeightFile
from arrowhead_engine.weightwriter import Compression, write


@dataclass(frozen=True)
class Converted:
    """What a conversion made.

    Attributes:
        name, version: of the model in the repository.
        weights: the weight file.
        spec, certificate: what it says of the model.
        notes: what the user should know of it, a line each.
        seconds: how long the conversion took.
    """

    name: str
    version: int
    weights: Path
    spec: ModelSpec
    certificate: Certificate
    notes: tuple[str, ...]
    seconds: float


def convert(
    source: str,
    name: str,
    repository_path: Path,
    *,
    revision: str | None = None,
    choices: pipeline.Choices | None = None,
    storage: weights.Storage = "float16",
    compression: Compression = "none",
    promote: bool = True,
    progress: bool | None = None,
) -> Converted:
    """Converts a model and publishes it as the next version of `name`.

    Args:
        source: a local folder, an installed package, or a hub id (sources.py).
        name: of the model in the repository.
        repository_path: the Triton model repository; made if it does not exist.
        revision: of a hub model.
        choices: what the user decides of pooling, normalising and the limit.
        storage: the dtype of the weights in the file.
        compression: of the file; only one without can be mapped.
        promote: whether it becomes the version that is served; a first version always does.
        progress: bars on stderr; None shows them on a terminal only.

    Raises:
        ConversionError, EngineError: what is wrong; nothing was published.
    """
    started = time.perf_counter()
    hide = None if progress is None else not progress
    repository.check_name(name)
    folder = sources.locate(source, revision)
    model = pipeline.describe(folder, source, revision, choices)
    tokenizer = _read(model.network / "tokenizer.json")
    spec = pipeline.exclude_prompts(model.spec, tokenizer)
    model = replace(model, spec=spec)
    highest, known = Tokenizer.parse(tokenizer, spec).highest_id, model.vocab_size
    if highest >= known:
        raise UnsupportedSource(
            f"{source}: its tokenizer gives ids up to {highest}, its network knows {known} (0 to "
            f"{known - 1})"
        )
    with repository.staged(
        repository_path, name, spec.dimension, spec.prompts, promote=promote
    ) as (stages, version):
        path = stages["_encoder"] / "weights.parquet"
        metadata = {MODEL_KEY: spec.to_json()}
        with tqdm(desc="writing weights", unit="B", unit_scale=True, disable=hide) as bar:
            write(path, _counted(weights.tensors(model, storage), bar), metadata, compression)
        with tqdm(desc="comparing with sentence-transformers", unit="text", disable=hide) as bar:
            bar.total = len(certificate.cases(spec))
            proof = certificate.certify(model, path, tokenizer, storage, bar.update)
        metadata[CERTIFICATE_KEY] = proof.to_json()
        # The proof is about the very bytes that were written, so it goes in by writing them again.
        with WeightFile.open(path) as written:
            write(path, written.stream(), metadata, compression)
        (stages["_tokenizer"] / "tokenizer.json").write_bytes(tokenizer)
        for part in ("_tokenizer", "_encoder"):
            write_metadata(stages[part] / "metadata.json", metadata)
    published = repository_path / f"{name}_encoder" / str(version) / "weights.parquet"
    seconds = time.perf_counter() - started
    return Converted(name, version, published, spec, proof, model.notes, seconds)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        reason = "missing" if isinstance(error, FileNotFoundError) else error.strerror
        raise SourceNotFound(f"{path}: {reason}; is the download complete?") from None


def _counted(tensors: Iterator[Tensor], bar: tqdm[NoReturn]) -> Iterator[Tensor]:
    for tensor in tensors:
        yield tensor
        bar.update(len(tensor.data))
