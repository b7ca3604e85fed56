# SPDX-License-Identifier: Apache-2.0
"""`Reread`: what a file says, read again when it changes. And whose file it must be."""

from __future__ import annotations

import logging
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from arrowhead_server.gateway.settings import BadSetting

T = TypeVar("T")
_LOG = logging.getLogger(__name__)
_LOOK_AGAIN_S = 1.0


class Reread(Generic[T]):
    """What a file says.

    It is looked at again at most once a second. A change that cannot be read is logged, and what
    the file said before it holds: a file that is away for a moment locks nobody out.

    Args:
        path: of the file.
        read: makes of it what is wanted, or raises `BadSetting`.

    Raises:
        BadSetting: it cannot be read now.
    """

    def __init__(self, path: Path, read: Callable[[Path], T]) -> None:
        self._path, self._read = path, read
        self._version, self._said = self._now(), read(path)
        self._looked = time.monotonic()

    def __call__(self) -> T:
        """What it says now."""
        if time.monotonic() - self._looked >= _LOOK_AGAIN_S:
            self._looked = time.monotonic()
            if (now := self._now()) != self._version:
                self._version = now
                try:
                    self._said = self._read(self._path)
                    _LOG.info("read again: %s", self._path)
                except BadSetting as error:
                    _LOG.warning("%s; what it said before holds", error)
        return self._said

    def _now(self) -> tuple[int, ...] | None:
        try:
            told = self._path.stat()
        except OSError:
            return None
        return told.st_mtime_ns, told.st_size, told.st_ino, told.st_mode


def text_of(path: Path) -> str:
    """What stands in a file.

    Raises:
        BadSetting: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadSetting(f"cannot read {path}: {error}") from error


def check_private(path: Path) -> None:
    """That nobody but its owner and group can read a file, and nobody but its owner change it.

    Raises:
        BadSetting: somebody can.
    """
    _check(path, 0o027, "is open to others", "600 or 640: chmod 600")


def check_unwritable(path: Path) -> None:
    """That nobody but its owner can change a file.

    Raises:
        BadSetting: somebody can.
    """
    _check(path, 0o022, "can be changed by others", "644 or 600: chmod 644")


def _check(path: Path, closed: int, met: str, wanted: str) -> None:
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
    except OSError as error:
        raise BadSetting(f"cannot read {path}: {error.strerror}") from error
    if mode & closed:
        raise BadSetting(f"{path} {met} (mode {mode:03o}); wanted {wanted} {path}")
