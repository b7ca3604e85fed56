# SPDX-License-Identifier: Apache-2.0
"""API keys. Only their hashes are kept: a line a key, its owner's name first.

    alice  sha256:0f1e...
    # two keys of one name: the old one, and the one that takes its place
    alice  sha256:9a8b...

A key is 32 random bytes, so a plain hash is enough: there is nothing to guess, and a slow hash, as
passwords need, would let strangers make the gateway work.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from arrowhead_server.gateway.reread import check_private, text_of
from arrowhead_server.gateway.settings import BadSetting

PREFIX = "ah_"  # so that those who search for leaked keys know one
_NAME = re.compile(r"[A-Za-z0-9._@-]{1,64}")
_LINE = re.compile(rf"({_NAME.pattern})\s+sha256:([0-9a-f]{{64}})")


class Keys:
    """The hashes of keys, and whose they are."""

    def __init__(self, text: str, source: str) -> None:
        self._owners: list[tuple[bytes, str]] = []
        for number, line in enumerate(re.split(r"[\n,]", text), 1):
            line = line.strip()
            if not line or line.startswith("#"):
                continue
            if (found := _LINE.fullmatch(line)) is None:
                # Not the line itself, which may be a key.
                raise BadSetting(
                    f"{source}, line {number}: wanted NAME sha256:64 hexadecimal digits, as "
                    "`arrowhead gateway-key NAME` prints it"
                )
            self._owners.append((bytes.fromhex(found[2]), found[1]))

    def __len__(self) -> int:
        """How many there are."""
        return len(self._owners)

    def owner(self, key: str) -> str | None:
        """Whose key this is; it takes as long whether it is somebody's or nobody's."""
        met, found = _hash(key), None
        for known, name in self._owners:
            if hmac.compare_digest(met, known):
                found = name
        return found


def read(path: Path) -> Keys:
    """The keys in a file.

    Raises:
        BadSetting: others can read it, or it is no such file.
    """
    check_private(path)
    return Keys(text_of(path), str(path))


def new() -> str:
    """A key that nobody has yet."""
    return PREFIX + secrets.token_urlsafe(32)


def line(name: str, key: str) -> str:
    """What is kept of a key.

    Raises:
        BadSetting: the name is none.
    """
    if _NAME.fullmatch(name) is None:
        raise BadSetting(f"name {name!r}: wanted 1 to 64 letters, digits and . _ @ -")
    return f"{name} sha256:{_hash(key).hex()}"


def add(path: Path, added: str) -> None:
    """Puts a line at the end of a file of keys, which is made if there is none.

    A link stays one, and who adds at the same moment waits.

    Raises:
        BadSetting: the file is none of keys, or cannot be written.
    """
    path = path.resolve()
    with _locked(path.parent):
        _add(path, added)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Not the file itself: another takes its place."""
    try:
        lock = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise BadSetting(f"cannot read {folder}: {error.strerror}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _add(path: Path, added: str) -> None:
    kept, before = None, ""
    if path.exists():
        read(path)
        kept, before = path.stat(), text_of(path)
        before += "" if not before or before.endswith("\n") else "\n"
    sibling = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        sibling.touch(0o600, exist_ok=False)
        sibling.write_text(f"{before}{added}\n", encoding="utf-8")
        if kept is not None:
            os.chown(sibling, -1, kept.st_gid)
            sibling.chmod(stat.S_IMODE(kept.st_mode))
        sibling.replace(path)
    except OSError as error:
        sibling.unlink(missing_ok=True)
        raise BadSetting(f"cannot write {path}: {error.strerror}") from error


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
