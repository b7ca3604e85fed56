# SPDX-License-Identifier: Apache-2.0
"""Which version is live: read from, and written into, the text of `config.pbtxt`.

There is no other record. An ensemble's steps are pinned to a version of its tokenizer and encoder,
and the version policies of all three name the versions that are served, so that any Triton on the
repository, ours or a bare one, serves the same. As text, because users write comments and settings
of their own into these files.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from google.protobuf.text_encoding import CEscape

PREVIOUS = "previous_version"  # the ensemble's parameter: where `rollback` goes

_COMMENT = re.compile(r"#[^\n]*")
_PIN = re.compile(r"(\bmodel_version\s*:\s*)(-?\d+)")
_POLICY = re.compile(
    r"\bversion_policy\s*:?\s*\{\s*\w+\s*:?\s*\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\}\s*\}"
)
_FACT = re.compile(
    r'^parameters \{ key: "(prompt\.(?:[^"\\]|\\.)*|previous_version)" value \{ string_value: '
    r'"((?:[^"\\]|\\.)*)" \} \}\n',
    re.MULTILINE,
)


def pin(ensemble: Path) -> int | None:
    """The version that an ensemble's steps are pinned to; None if to none, or there is none."""
    path = ensemble / "config.pbtxt"
    if not path.is_file():
        return None
    met = _PIN.search(_COMMENT.sub("", path.read_text(encoding="utf-8")))
    return int(met[2]) if met and int(met[2]) > 0 else None


def live(repository: Path, name: str) -> int | None:
    """The version of a model that is served: pinned, or else the newest; None if there is none."""
    found = (repository / f"{name}_encoder").glob("*/weights.parquet")
    newest = [int(path.parent.name) for path in found if path.parent.name.isdecimal()]
    if not (repository / name / "config.pbtxt").is_file() or not newest:
        return None
    return pin(repository / name) or max(newest)


def previous(repository: Path, name: str) -> int | None:
    """The version that was live before; None if none was."""
    path = repository / name / "config.pbtxt"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return next((int(value) for key, value in _FACT.findall(text) if key == PREVIOUS), None)


def with_pin(text: str, version: int) -> str:
    """The ensemble's configuration with its steps pinned to a version."""
    return _PIN.sub(rf"\g<1>{version}", text)


def with_versions(text: str, versions: Sequence[int]) -> str:
    """The configuration with these versions served."""
    policy = f"version_policy: {{ specific {{ versions: [ {', '.join(map(str, versions))} ] }} }}"
    if _POLICY.search(text):
        return _POLICY.sub(policy, text)
    return f"{text.rstrip()}\n{policy}\n"


def with_facts(text: str, facts: Mapping[str, str]) -> str:
    """The ensemble's configuration with these of our parameters, and no others of ours."""
    lines = "".join(
        f'parameters {{ key: "{CEscape(key.encode(), False)}" value {{ string_value: '
        f'"{CEscape(value.encode(), False)}" }} }}\n'
        for key, value in facts.items()
    )
    bare = _FACT.sub("", text)
    return f"{bare.rstrip()}\n{lines}" if lines else bare


def replace(path: Path, text: str) -> None:
    """Writes the file whole, unless it says that already."""
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
