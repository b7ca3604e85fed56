# SPDX-License-Identifier: Apache-2.0
"""Files of a model repository, read by a process that must go on whatever lies there.

Others write into it: in a file's place there may be a pipe, which holds its reader for ever, or a
device or a file without an end, which fills memory. So what is read is a regular file, and no more
of it than was said. Imports nothing heavy: the running server reads with it every second.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

MOST_BYTES = 1 << 20  # of a configuration, a certificate, a signature or a key
MOST_FILES = 10_000  # beside a model's versions
_BLOCK = 1 << 20


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """The regular file at `path`, to be read.

    Raises:
        OSError: it is none, or cannot be opened.
    """
    # Without waiting: a pipe in a file's place would else hold us for ever.
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    with os.fdopen(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "is no regular file", str(path))
        yield file


def read(path: Path, most: int = MOST_BYTES) -> bytes:
    """All of a regular file.

    Raises:
        OSError: it is none, cannot be read, or has more than `most` bytes.
    """
    with opened(path) as file:
        return taken(file, path, most)


def taken(file: IO[bytes], path: Path, most: int = MOST_BYTES) -> bytes:
    """All of a file that `opened` gave; raises as `read` does."""
    raw = file.read(most + 1)
    if len(raw) > most:
        raise OSError(errno.EFBIG, f"has more than {most} bytes", str(path))
    return raw


def text(path: Path, most: int = MOST_BYTES) -> str:
    """As `read`, decoded.

    Raises:
        OSError: as `read`.
        UnicodeDecodeError: it is no UTF-8.
    """
    return read(path, most).decode("utf-8")


def copy(source: Path, target: Path, most: int) -> int:
    """Copies a regular file; how many bytes it has.

    Raises:
        OSError: as `read`, or the copy cannot be written.
    """
    size = 0
    with opened(source) as file, target.open("xb") as written:
        while block := file.read(_BLOCK):
            size += len(block)
            if size > most:
                raise OSError(errno.EFBIG, f"has more than {most} bytes", str(source))
            written.write(block)
    return size


def beside(model: Path) -> Iterator[Path]:
    """The files that a model's configuration may name: in folders beside those of its versions.

    Links to folders are followed beside the versions, and nowhere below.

    Raises:
        OSError: a folder cannot be read, or there are more than `MOST_FILES` files and folders.
    """
    left = MOST_FILES
    folders = [model]
    while folders:
        folder = folders.pop()
        with os.scandir(folder) as entries:
            for entry in entries:
                left -= 1
                if left < 0:
                    raise OSError(errno.EFBIG, f"has more than {MOST_FILES} files", str(model))
                if entry.is_dir(follow_symlinks=folder == model):
                    if folder != model or not (entry.name[0] == "." or entry.name.isdecimal()):
                        folders.append(Path(entry.path))
                elif folder != model and entry.is_file():
                    yield Path(entry.path)
