# SPDX-License-Identifier: Apache-2.0
"""One conversion, from what the user names to an entry that Triton can serve."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

from arrowhead_conversion import certificate, pipeline, repository, sources, weights
from arrowhead_conversion.errors import SourceNotFound, UnsupportedSource
from arrowhead_engine.spec import CERTIFICATE_KEY, MODEL_KEY, Certificate, ModelSpec, write_metadata
from arrowhead_engine.tokenizer import Tokenizer
from arrowhead_engine.weightfile import Tensor, WeightFile, write


@dataclass(frozen=True)
class Converted:
    """What a conversion made.

    Attributes:
        name, version: of the model in the repository.
        weights: the weight file.
        spec, certificate: what it says of the model.
        seconds: how long the conversion took.
    """

    name: str
    version: int
    weights: Path
    spec: ModelSpec
    certificate: Certificate
    seconds: float


def convert(
    source: str,
    name: str,
    repository_path: Path,
    *,
    revision: str | None = None,
    progress: bool | None = None,
) -> Converted:
    """Converts a model and publishes it as the next version of `name`.

    Args:
        source: a local folder, an installed package, or a hub id (sources.py).
        name: of the model in the repository.
        repository_path: the Triton model repository; made if it does not exist.
        revision: of a hub model.
        progress: bars on stderr; None shows them on a terminal only.

    Raises:
        ConversionError, EngineError: what is wrong; nothing was published.
    """
    started = time.perf_counter()
    hide = None if progress is None else not progress
    repository.check_name(name)
    folder = sources.locate(source, revision)
    spec = pipeline.read_spec(folder, source, revision)
    tokenizer = _read(folder / "tokenizer.json")
    highest, known = Tokenizer.parse(tokenizer, spec).highest_id, spec.config["vocab_size"]
    if highest >= known:
        raise UnsupportedSource(
            f"{source}: its tokenizer gives ids up to {highest}, its network knows {known} (0 to "
            f"{known - 1})"
        )
    with repository.staged(repository_path, name, spec.dimension) as (stages, version):
        path = stages["_encoder"] / "weights.parquet"
        metadata = {MODEL_KEY: spec.to_json()}
        with tqdm(desc="writing weights", unit="B", unit_scale=True, disable=hide) as bar:
            write(path, _counted(weights.tensors(folder, spec), bar), metadata)
        with tqdm(desc="comparing with sentence-transformers", unit="text", disable=hide) as bar:
            bar.total = len(certificate.TEXTS)
            proof = certificate.certify(folder, path, tokenizer, spec, bar.update)
        metadata[CERTIFICATE_KEY] = proof.to_json()
        # The proof is about the very bytes that were written, so it goes in by writing them again.
        with WeightFile.open(path) as written:
            write(path, written.stream(), metadata)
        (stages["_tokenizer"] / "tokenizer.json").write_bytes(tokenizer)
        for part in ("_tokenizer", "_encoder"):
            write_metadata(stages[part] / "metadata.json", metadata)
    published = repository_path / f"{name}_encoder" / str(version) / "weights.parquet"
    return Converted(name, version, published, spec, proof, time.perf_counter() - started)


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
