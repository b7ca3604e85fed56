# SPDX-License-Identifier: Apache-2.0
"""The folder that Triton is shown: private, written by us alone, looked at by Triton every second.

    shown/minilm/config.pbtxt            the repository's, pinned to one version
                 1/  2/                  empty, and always there (see `show_ensemble`)
    shown/minilm_encoder/config.pbtxt    the repository's, all versions that are shown
                         1/              links to the files of the repository's version folder
                         warmup          a copy

What is in it is what Triton serves (`--model-control-mode=poll`): no administration API is needed,
so none is open. A model that a conversion is still writing is not in it; and Triton's Python stubs
never start on a path with a blank or a letter beyond ASCII, which this one has not.

Measured with Triton 2.51: a version that is added loads beside the others, which stay untouched as
long as their own files do; one that is taken away is unloaded and its process ends; a change of the
ensemble's configuration is taken up at one moment, and requests in flight end on what they began.
One that does not load is tried again at nearly every look for as long as it is there, and changes
nothing for the others.

Triton sees a change where the latest time of a folder's files is *later* than it was. So the times
are ours too: every change is stamped years ahead, by a count that only goes up, which outshines
those of the linked files. Otherwise a conversion that writes `warmup` anew, or a touched file,
would load the live version once more and end its process; and a file dated tomorrow would hide
what happens until then.
"""

import os
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

from arrowhead_conversion import files, pins
from arrowhead_conversion.errors import RegistryError
from arrowhead_server.repository import EmbeddingModel

if TYPE_CHECKING:  # it takes what only signed models need
    from arrowhead_server.admission import Admission

# Further than a server runs, and not beyond 2038, where some file systems end.
_AHEAD_NS = 5 * 365 * 86_400 * 10**9
_MOST_BESIDE = 64 << 20  # bytes of what lies beside a part's versions; it is copied


class Shown:
    """The folder and its changes, each of which Triton sees whole or not at all.

    Args:
        repository: what is served.
        folder: to be made, on a path without blanks; beside it lies what is being prepared.
        admission: where to take versions from, in place of the repository: they must be signed.
    """

    def __init__(
        self, repository: Path, folder: Path, admission: "Admission | None" = None
    ) -> None:
        self._admission = admission
        self._repository = repository
        self._folder = folder
        self._stage = folder.with_name(f"{folder.name}-stage")
        self._clock_ns = time.time_ns() + _AHEAD_NS
        self._last: dict[str, str] = {}  # the configuration last shown of each ensemble
        self._taken_up: dict[EmbeddingModel, str] = {}

    @property
    def folder(self) -> Path:
        """What Triton is to be given as its model repository."""
        return self._folder

    def has(self, model: EmbeddingModel) -> bool:
        """Whether there still is what the model is made of."""
        if self._admission is not None and model.pair in self._admission:
            return model in self._taken_up  # copies of ours, whatever has become of the repository
        parts = [self._repository / part / str(model.version) for part in model.parts]
        return (self._repository / model.name / "config.pbtxt").is_file() and all(
            part.is_dir() for part in parts
        )

    def clear(self) -> None:
        """Begins anew, for a Triton that is not running."""
        for folder in (self._folder, self._stage):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)

    def show_part(self, part: str, version: int) -> None:
        """Adds a version of a tokenizer or encoder."""
        root = self._repository
        if self._admission is not None:
            root = self._admission.copy((part.rpartition("_")[0], version))
        source, target = root / part, self._folder / part
        stage = self._stage / f"{part}-{version}"
        shutil.rmtree(stage, ignore_errors=True)
        stage.mkdir()
        for file in (source / str(version)).iterdir():
            if file.is_file():
                (stage / file.name).symlink_to(file)
        # In place of the folder in which Python would keep the compiled model.py. Triton would take
        # that for a change of the version and load it once more, with everything that uses it.
        (stage / "__pycache__").touch()
        self._stamp(stage / "__pycache__")
        if target.is_dir():
            stage.rename(target / str(version))
            return
        model = self._stage / part
        shutil.rmtree(model, ignore_errors=True)
        model.mkdir()
        stage.rename(model / str(version))
        # What the configuration names, such as `warmup`. A copy: Triton would take a change of it
        # for a change of the model, and load all its versions once more.
        room = _MOST_BESIDE
        for extra in files.beside(source):
            copy = model / extra.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            room -= files.copy(extra, copy, room)
        config = files.text(source / "config.pbtxt")
        config = pins.without(config, "version_policy") + "\nversion_policy: { all { } }\n"
        (model / "config.pbtxt").write_text(config, encoding="utf-8")
        model.rename(target)

    def hide_part(self, part: str, version: int) -> None:
        """Takes a version away; with the last one the model itself goes."""
        target = self._folder / part
        if sum(folder.name.isdecimal() for folder in target.iterdir()) == 1:
            target.rename(self._stage / f"{part}-gone")
            shutil.rmtree(self._stage / f"{part}-gone")
        else:
            (target / str(version)).rename(self._stage / f"{part}-{version}-gone")
            self._stamp(target)
            shutil.rmtree(self._stage / f"{part}-{version}-gone")

    def show_ensemble(self, model: EmbeddingModel) -> None:
        """Serves the model at its version, from the next look that Triton takes.

        With the configuration that Triton took up for it before, if it did: that one is good.

        Raises:
            OSError, ValueError: its configuration cannot be read, or has nothing to pin.
            NotSignedError: it is not the one that was signed.
        """
        config = self._taken_up.get(model)
        if config is None:
            path = self._repository / model.name / "config.pbtxt"
            try:
                text = files.text(path)
                if self._admission is not None:
                    self._admission.check_ensemble(model, text)
                config = pins.with_pin(text, model.version)
            except RegistryError as error:
                raise ValueError(f"{path}: {error}") from error
            config = pins.with_versions(config, [model.version])
        self._last[model.name] = config
        target = self._folder / model.name
        if not target.is_dir():
            stage = self._stage / model.name
            shutil.rmtree(stage, ignore_errors=True)
            (stage / str(model.version)).mkdir(parents=True)
            (stage / "config.pbtxt").write_text(config, encoding="utf-8")
            self._stamp(stage)
            stage.rename(target)
            return
        # The folders of earlier versions stay: which one is served is said in the configuration
        # alone. Triton reads that and the folders at different times, and would else, in between,
        # load the new version with the old one's steps: wrong vectors, kept by the response cache.
        (target / str(model.version)).mkdir(exist_ok=True)
        draft = self._stage / f"{model.name}.pbtxt"
        draft.write_text(config, encoding="utf-8")
        draft.replace(target / "config.pbtxt")
        self._stamp(target)

    def taken_up(self, model: EmbeddingModel) -> None:
        """Triton serves the model as it was shown last."""
        self._taken_up[model] = self._last[model.name]

    def hide_ensemble(self, name: str) -> None:
        """Stops serving a model."""
        gone = self._stage / f"{name}-gone"
        (self._folder / name).rename(gone)
        shutil.rmtree(gone)

    def _stamp(self, path: Path) -> None:
        """Makes this the latest change that Triton knows of."""
        # Coarser file systems keep microseconds at best.
        self._clock_ns += 1_000_000
        os.utime(path, ns=(self._clock_ns, self._clock_ns))
