# SPDX-License-Identifier: Apache-2.0
"""Texts to vectors: by the engine in this process, or by Tritons that run somewhere.

Either way they are tokenized here, by the model's own tokenizer: the output tells of each text how
many tokens were read of it.
"""

from __future__ import annotations

import json
import os
import stat
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from arrowhead_bulk.errors import BadModel
from arrowhead_client import ArrowheadError, Client, Config, ModelInfo
from arrowhead_conversion import pins
from arrowhead_engine.errors import EngineError
from arrowhead_engine.spec import ModelSpec, info, parse_metadata, read_metadata
from arrowhead_engine.tokenizer import Tokenizer

Vectors = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Model:
    """Which model embeds, and where; what a worker needs to open it.

    Attributes:
        name: what it is called.
        repository: where it is converted, unless there is an endpoint.
        version: of it, in the repository.
        endpoint: the url of a Triton, or of what stands in front of several; "" is none.
        device, dtype: see `Encoder.open`.
        threads: that compute; 0: as many as there are cores.
        shared: whether the user's processes on one machine lay the weights out once for all.
    """

    name: str
    repository: str = "model_repository"
    version: int = 0
    endpoint: str = ""
    device: str = "auto"
    dtype: str = "auto"
    threads: int = 0
    shared: bool = False

    def told(self) -> ModelInfo:
        """What it says of itself.

        Raises:
            BadModel: it is not there, or cannot be read.
        """
        if self.endpoint:
            try:
                with Client(self.endpoint, model=self.name) as client:
                    return client.info()
            except ArrowheadError as error:
                raise BadModel(str(error)) from error
        version, tokenizer, _ = self._folders()
        try:
            metadata = read_metadata(tokenizer / "metadata.json")
            answer = {"info": np.array([[json.dumps(info(metadata)).encode()]], np.object_)}
            prompts = dict(ModelSpec.from_metadata(metadata).prompts)
            return ModelInfo.told(self.name, Config(prompts, self.name, version), answer)
        except (EngineError, ArrowheadError, OSError) as error:
            raise BadModel(f"model {self.name!r} cannot be read: {error}") from error

    def open(self, info: ModelInfo) -> Embedding:
        """Opens it; takes a while.

        Args:
            info: what it is; of several versions that one is asked.

        Raises:
            BadModel: it is not there, or not sound.
        """
        return self._remote(info) if self.endpoint else self._local()

    def _folders(self) -> tuple[int, Path, Path]:
        """The version, and the folders of tokenizer and encoder."""
        repository = Path(self.repository)
        version = self.version or pins.live(repository, self.name)
        if version is None:
            raise BadModel(
                f"no model {self.name!r} in {repository.absolute()}: name one with --repository "
                "and --model, or make one with `arrowhead convert`"
            )
        folders = (repository / f"{self.name}_{part}" / str(version) for part in _PARTS)
        tokenizer, encoder = folders
        return version, tokenizer, encoder

    def _local(self) -> Embedding:
        from arrowhead_engine.encoder import Encoder

        _, tokenizer, folder = self._folders()
        try:
            encoder = Encoder.open(
                folder / "weights.parquet",
                device=self.device,
                dtype=self.dtype,
                threads=self.threads or None,
                shared=_own_folder() if self.shared else None,
            )
            encoder.verify()
            opened = Tokenizer.open(tokenizer)
        except (EngineError, OSError) as error:
            raise BadModel(f"model {self.name!r} cannot be opened: {error}") from error

        def vectors(ids: Sequence[list[int]]) -> Vectors:
            return encoder.embed([np.array(row, np.int32) for row in ids])

        return Embedding(self.told(), opened, vectors)

    def _remote(self, served: ModelInfo) -> Embedding:
        client = Client(self.endpoint, model=self.name, batch_size=100)
        try:
            files = client.files(served)
            metadata = parse_metadata(files.metadata, "the served metadata.json")
            opened = Tokenizer.certified(files.tokenizer, metadata, "the served tokenizer.json")
        except (EngineError, ArrowheadError) as error:
            raise BadModel(str(error)) from error

        def vectors(ids: Sequence[list[int]]) -> Vectors:
            found: Vectors = client.embed_ids(ids, served=served)
            return found

        return Embedding(served, opened, vectors)


def _own_folder() -> Path | None:
    """Of this user on this machine; None where it cannot be made, or somebody else has it."""
    folder = Path(tempfile.gettempdir()) / f"arrowhead-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError:
        return None
    is_own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
    return folder if is_own and not found.st_mode & 0o077 else None


_PARTS = ("tokenizer", "encoder")


@dataclass(frozen=True)
class Embedding:
    """An open model.

    Attributes:
        info: what it is.
        tokenizer: its own.
        vectors: float32 [N, D] of the ids of N texts.
    """

    info: ModelInfo
    tokenizer: Tokenizer
    vectors: Callable[[Sequence[list[int]]], Vectors]
