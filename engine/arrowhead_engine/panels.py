# SPDX-License-Identifier: Apache-2.0
"""Where the laid-out weights of linear layers lie: memory of this process, or a file for several.

Processes that are given one folder share: the first lays the weights out into a file, the others
map that, read-only. So the pages are in memory once, and the system may drop those that nobody
reads.

    lock          held while a file is made, found or removed
    <key>         panels, whole, and their CRC-32; locked, shared, by every process that maps it
    unfinished    what is being made, or was when its maker was killed

The locks are flock's: a process gives them up when it ends, however it does.
"""

from __future__ import annotations

import fcntl
import logging
import mmap
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import accumulate
from pathlib import Path

import numpy as np

LOGGER = logging.getLogger(__name__)

LayOut = Callable[[int, int], None]  # (a layer's number, the address to lay it out at)
_CHECKSUM_BYTES = 4


class Panels:
    """Laid-out layers, end to end.

    Attributes:
        addresses: where each begins.
    """

    def __init__(self, memory: mmap.mmap, sizes: Sequence[int], folder: Path | None = None) -> None:
        first = _address(memory)
        self.addresses = [first + start for start in accumulate(sizes[:-1], initial=0)]
        self._memory = memory
        self._folder = folder

    @classmethod
    def private(cls, sizes: Sequence[int], lay_out: LayOut) -> Panels:
        """Layers of so many bytes each, in memory of this process.

        Raises:
            MemoryError: there is not enough.
        """
        panels = cls(_memory(sum(sizes)), sizes)
        for number, address in enumerate(panels.addresses):
            lay_out(number, address)
        return panels

    @classmethod
    def shared(cls, path: Path, sizes: Sequence[int], lay_out: LayOut) -> Panels:
        """The same in a file, laid out only if nobody did so before.

        Args:
            path: named for all that decides over a bit of it, in a folder of the user's own.
            sizes: bytes of each layer.
            lay_out: puts one there.

        Raises:
            OSError: the folder is full, or is not to be written.
            MemoryError: there is not enough for the largest layer.
        """
        with _locked(path.parent):
            memory = _found(path, sum(sizes))
            if memory is None:
                _make(path, sizes, lay_out)
                memory = _found(path, sum(sizes))
                _remove_unused(path.parent)
        if memory is None:
            raise OSError(f"{path}: not what was written just now")
        return cls(memory, sizes, path.parent)

    def close(self) -> None:
        """Gives the memory back; the last process that used a file removes it."""
        self._memory.close()  # and with it the lock
        if self._folder is not None:
            with suppress(OSError), _locked(self._folder):  # the server may have removed it
                _remove_unused(self._folder)


def _found(path: Path, size: int) -> mmap.mmap | None:
    """The file's map, if it is there and sound. The map keeps it locked."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH)
            # Its descriptor is a copy of this one, and a lock lasts as long as any copy.
            memory = mmap.mmap(file.fileno(), 0, mmap.MAP_SHARED, mmap.PROT_READ)
    except FileNotFoundError:
        return None
    except ValueError:  # it is empty
        memory = None
    if memory is not None and len(memory) == size + _CHECKSUM_BYTES:
        with memoryview(memory) as whole, whole[:size] as panels:
            if _bytes(zlib.crc32(panels)) == whole[size:]:
                return memory
    LOGGER.warning("%s: damaged; laid out anew", path)
    path.unlink()  # who has it mapped keeps what he proved
    return None


def _make(path: Path, sizes: Sequence[int], lay_out: LayOut) -> None:
    """Writes the file. Not through a map: where a disk is full, that ends the process."""
    unfinished = path.with_name("unfinished")
    checksum = 0
    try:
        with _memory(max(sizes)) as scratch, unfinished.open("wb") as file:
            for number, size in enumerate(sizes):
                lay_out(number, _address(scratch))
                with memoryview(scratch) as whole, whole[:size] as panels:
                    checksum = zlib.crc32(panels, checksum)
                    file.write(panels)
            file.write(_bytes(checksum))
        unfinished.rename(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _remove_unused(folder: Path) -> None:
    """Removes the files that no process maps: of versions that are gone, of makers killed."""
    for path in folder.iterdir():
        if path.name == "lock":
            continue
        with suppress(OSError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with (folder / "lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _memory(size: int) -> mmap.mmap:
    try:
        return mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError("not enough to lay the weights out") from error


def _address(memory: mmap.mmap) -> int:
    return np.frombuffer(memory, np.uint8).ctypes.data


def _bytes(checksum: int) -> bytes:
    return checksum.to_bytes(_CHECKSUM_BYTES, "little")
