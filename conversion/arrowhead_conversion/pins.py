# SPDX-License-Identifier: Apache-2.0
"""Which version is live: read from, and written into, the text of `config.pbtxt`.

There is no other record. An ensemble's steps are pinned to a version of its tokenizer and encoder,
and the version policies of all three name the versions that are served, so that any Triton on the
repository, ours or a bare one, serves the same. As text, because users write comments and settings
of their own into these files; what is written is parsed again before it takes the file's place.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from google.protobuf.text_encoding import CEscape, CUnescape

from arrowhead_conversion.errors import RegistryError

CANDIDATE = "_candidate"  # ends the name of the ensemble over a version that is tried out
PREVIOUS = "previous_version"  # the ensemble's parameter: where `rollback` goes
HIGHEST = "highest_version"  # likewise: the highest number ever given out, removed or not

_COMMENT_OR_STRING = re.compile(r"""#[^\n]*|"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*'""")
_PIN = re.compile(r"(\bmodel_version\s*:\s*)(-?\d+)")
_NAME = re.compile(r"^\s*name\s*:\s*(?=[\"'])", re.MULTILINE)
_FACT = re.compile(
    r"""\bkey\s*:\s*"((?:[^"\\]|\\.)*)".*?\bstring_value\s*:\s*"((?:[^"\\]|\\.)*)\"""", re.DOTALL
)
_STRING = re.compile(r"""\b(key|string_value)\s*:\s*("\s*"|'\s*')""")  # in masked text
_OPENING, _CLOSING = "{<[", "}>]"


def masked(text: str) -> str:
    """The text with what is in comments and strings blanked out; every place stays what it was."""

    def blank(found: re.Match[str]) -> str:
        inside = " " * (len(found[0]) - 2)
        return " " * len(found[0]) if found[0][0] == "#" else f"{found[0][0]}{inside}{found[0][0]}"

    return _COMMENT_OR_STRING.sub(blank, text)


def fields(text: str, name: str) -> Iterator[tuple[int, int]]:
    """Where the message fields of that name begin and end, at the top level of the text."""
    bare = masked(text)
    head, depth, place = re.compile(rf"\b{name}\s*:?\s*(?=[{{<])"), 0, 0
    while place < len(bare):
        found = head.match(bare, place) if depth == 0 else None
        if found and not bare[place - 1 : place].isalnum():
            end = _matching(bare, found.end())
            yield place, end
            place = end
            continue
        depth += (bare[place] in _OPENING) - (bare[place] in _CLOSING)
        place += 1


def _matching(bare: str, start: int) -> int:
    depth = 0
    for place in range(start, len(bare)):
        depth += (bare[place] in _OPENING) - (bare[place] in _CLOSING)
        if depth == 0:
            return place + 1
    return len(bare)


def strings(text: str, name: str) -> list[str]:
    """The values of the string fields of that name, at any depth, as they are written."""
    starts = [found.end() for found in re.finditer(rf"\b{name}\s*:\s*(?=[\"'])", masked(text))]
    return [text[start + 1 : text.index(text[start], start + 1)] for start in starts]


def parameter(text: str, key: str) -> tuple[int, int] | None:
    """Where the string of that parameter begins and ends; None if there is none."""
    bare = masked(text)
    for found in _STRING.finditer(bare):
        if found[1] != "key" or text[found.start(2) + 1 : found.end(2) - 1] != key:
            continue
        start, depth = found.start(), 0  # back to where the message around it opens
        while start and depth < 1:
            start -= 1
            depth += (bare[start] in _OPENING) - (bare[start] in _CLOSING)
        for value in _STRING.finditer(bare, start, _matching(bare, start)):
            if value[1] == "string_value":
                return value.start(2) + 1, value.end(2) - 1
    return None


def pins(text: str) -> set[int]:
    """The versions that an ensemble's steps are pinned to."""
    return {int(found[2]) for found in _PIN.finditer(masked(text))}


def pin(ensemble: Path) -> int | None:
    """The version that an ensemble's steps are pinned to; None if to none, or there is none."""
    path = ensemble / "config.pbtxt"
    if not path.is_file():
        return None
    return max(
        (found for found in pins(path.read_text(encoding="utf-8")) if found > 0), default=None
    )


def versions(repository: Path, name: str) -> list[int]:
    """The complete versions of a model, ascending."""
    found = (repository / f"{name}_encoder").glob("*/weights.parquet")
    return sorted(int(path.parent.name) for path in found if path.parent.name.isdecimal())


def highest(repository: Path, name: str) -> int:
    """The highest version that was ever given out, removed or not; 0 if none was."""
    return max([*versions(repository, name), fact(repository, name, HIGHEST) or 0])


def live(repository: Path, name: str) -> int | None:
    """The version of a model that is served: pinned, or else the newest; None if there is none."""
    known = versions(repository, name)
    if not (repository / name / "config.pbtxt").is_file() or not known:
        return None
    return pin(repository / name) or known[-1]


def fact(repository: Path, name: str, key: str) -> int | None:
    """`PREVIOUS` or `HIGHEST` of a model; None if it is not written down."""
    path = repository / name / "config.pbtxt"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    value = facts(text).get(key, "")
    return int(value) if value.isdecimal() else None


def facts(text: str) -> dict[str, str]:
    """Our parameters in an ensemble's configuration, prompts included."""
    return {key: value for _, _, key, value in _facts(text)}


def _facts(text: str) -> Iterator[tuple[int, int, str, str]]:
    """Our parameters in an ensemble's configuration: from where to where, key and value."""
    for start, end in fields(text, "parameters"):
        found = _FACT.search(text[start:end])
        if found is None:
            continue
        key, value = (CUnescape(part).decode("utf-8", "replace") for part in found.groups())
        if key in (PREVIOUS, HIGHEST) or key.startswith("prompt."):
            yield start, end, key, value


def with_pin(text: str, version: int) -> str:
    """The ensemble's configuration with its steps pinned to a version.

    Raises:
        RegistryError: a step has no `model_version` to pin.
    """
    found = list(_PIN.finditer(masked(text)))
    if not found or len(found) != len(strings(text, "model_name")):
        raise RegistryError(
            "the ensemble's steps have no model_version each: write `model_version: -1` into all, "
            "after their model_name"
        )
    for match in reversed(found):
        text = text[: match.start(2)] + str(version) + text[match.end(2) :]
    return text


def with_versions(text: str, versions: Sequence[int]) -> str:
    """The configuration with these versions served."""
    policy = f"version_policy: {{ specific {{ versions: [ {', '.join(map(str, versions))} ] }} }}"
    first = next(fields(text, "version_policy"), None)
    if first is None:
        return f"{text.rstrip()}\n{policy}\n"
    start, end = first
    return text[:start] + policy + without(text[end:], "version_policy")


def without(text: str, name: str) -> str:
    """The text without the message fields of that name, at the top level."""
    for start, end in reversed(list(fields(text, name))):
        text = text[:start] + text[end:]
    return text


def with_name(text: str, name: str) -> str:
    """The configuration under another name."""
    found = _NAME.search(masked(text))
    if found is None:
        return f'name: "{name}"\n{text}'
    closing = text.index(text[found.end()], found.end() + 1)
    return f'{text[: found.end()]}"{name}"{text[closing + 1 :]}'


def with_facts(text: str, facts: Mapping[str, str]) -> str:
    """The ensemble's configuration with these of our parameters, and no others of ours."""
    for start, end, _, _ in reversed(list(_facts(text))):
        line = text[:start].rpartition("\n")[2].strip() == "" and text[end : end + 1] == "\n"
        text = text[:start] + text[end + line :]
    lines = "".join(
        f'parameters {{ key: "{CEscape(key.encode(), False)}" value {{ string_value: '
        f'"{CEscape(value.encode(), False)}" }} }}\n'
        for key, value in facts.items()
    )
    return f"{text.rstrip()}\n{lines}" if lines else text


def replace(path: Path, text: str) -> None:
    """Writes the file whole, unless it says that already.

    Raises:
        RegistryError: Triton could not read the text; the file stays as it is.
    """
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return
    _parse(path, text)
    put(path, text)


def put(path: Path, text: str) -> None:
    """Writes the file whole: who reads it meanwhile has what was there before, or all of this."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _parse(path: Path, text: str) -> None:
    # Imported here: it takes half a second.
    from google.protobuf import text_format
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    try:
        text_format.Parse(text, ModelConfig())
    except text_format.ParseError as error:
        raise RegistryError(f"{path} cannot be changed: it would not be read ({error})") from error
