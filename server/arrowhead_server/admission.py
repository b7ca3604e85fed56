# SPDX-License-Identifier: Apache-2.0
"""Who may be served: with a public key, only versions that were signed with its private one.

What is checked must be what Triton then loads, so a version is copied while it is compared, into a
folder of ours that nobody else may write, and Triton is shown the copy. Nothing that happens to the
repository afterwards touches it, not even a write into the very file that was mapped. That is what
it costs: room for the weights, and one to two seconds for each gigabyte.
"""

import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from arrowhead_conversion import signing
from arrowhead_conversion.errors import BadKey, BadSignature
from arrowhead_server.errors import NotSignedError, RepositoryError
from arrowhead_server.repository import EmbeddingModel, Pair


class Admission:
    """The versions that were proved to be signed, and their copies.

    Args:
        repository: what is to be served.
        folder: to be made, on a path that nobody else may write.
        public_key: file of the key, in PEM.

    Raises:
        RepositoryError: the key cannot be used.
    """

    def __init__(self, repository: Path, folder: Path, public_key: Path) -> None:
        self._repository = repository
        self._folder = folder
        try:
            self._key = signing.read_public_key(public_key)
        except BadKey as error:
            raise RepositoryError(str(error)) from error
        self._numbers = count(1)
        # The copy, what its signature says, and the signature itself.
        self._admitted: dict[Pair, tuple[Path, signing.Statement, bytes]] = {}

    def __contains__(self, pair: Pair) -> bool:
        return pair in self._admitted

    def admit(self, pair: Pair, progress: signing.Progress = lambda _: None) -> None:
        """Proves a version and copies it, unless its copy is there; may take long.

        Args:
            pair: the version.
            progress: called with how many more bytes were read; what it raises ends the copying.

        Raises:
            NotSignedError: the message says which file is at fault, and what to do. A copy that
                was made before stays.
        """
        copy = self._folder / f"{pair[0]}-{pair[1]}-{next(self._numbers)}"
        try:
            signature = signing.read_signature(self._repository, *pair)
            if pair in self._admitted and self._admitted[pair][2] == signature:
                return
            copy.mkdir(parents=True, mode=0o700)
            with _removed_on_failure(copy):
                statement = signing.check(self._repository, *pair, self._key, copy, progress)
        except BadSignature as error:
            raise NotSignedError(str(error)) from error
        except OSError as error:  # the copy cannot be made: most likely no room is left
            raise NotSignedError(
                f"{pair[0]} version {pair[1]} cannot be copied to {self._folder} "
                f"({error.strerror}); make room there, or set TMPDIR"
            ) from error
        before = self._admitted.get(pair)
        self._admitted[pair] = copy, statement, signature
        if before is not None:
            shutil.rmtree(before[0])

    def copy(self, pair: Pair) -> Path:
        """Where the copy of an admitted version is, laid out as a repository."""
        return self._admitted[pair][0]

    def check_ensemble(self, model: EmbeddingModel, text: str) -> None:
        """Proves the configuration of the ensemble over an admitted version.

        Raises:
            NotSignedError: it is not the one that was signed.
        """
        try:
            signing.check_config(self._admitted[model.pair][1], model.name, text)
        except BadSignature as error:
            raise NotSignedError(str(error)) from error

    def keep(self, pairs: Collection[Pair]) -> None:
        """Removes the copies of all other versions."""
        for pair in self._admitted.keys() - pairs:
            shutil.rmtree(self._admitted.pop(pair)[0])


@contextmanager
def _removed_on_failure(folder: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
