# SPDX-License-Identifier: Apache-2.0
"""What tools answer: small enough for a model to read, and honest about what was left out."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, TypeVar

import numpy as np
import pydantic_core

from arrowhead_client._algebra import Vectors, quantize

Encoding: TypeAlias = Literal["preview", "binary", "float32"]
Answer = TypeVar("Answer")
Row = TypeVar("Row")

MOST_CHARS, LEAST_CHARS = 4000, 1500
_TEXT_CHARS, _FIELD_CHARS, _ERROR_CHARS = 240, 80, 1000
_PREVIEW = 8


@dataclass(frozen=True)
class EmbeddedText:
    """One text's vector.

    Attributes:
        tokens: that the model reads of it.
        truncated: whether it has more.
        vector: in the encoding that was asked for; None where the answer has no room for it.
    """

    tokens: int
    truncated: bool
    vector: list[float] | str | None = None


@dataclass(frozen=True)
class Embeddings:
    """What `embed` answers; `texts` are in the order of the call."""

    model: str
    dimension: int
    encoding: Encoding
    texts: list[EmbeddedText]
    note: str | None = None


@dataclass(frozen=True)
class Match:
    """One of the texts compared: its place in the call from 0, its cosine, and its beginning."""

    index: int
    score: float
    text: str


@dataclass(frozen=True)
class Matches:
    """What `similarity` answers: the highest first, of so many that were compared."""

    compared: int
    matches: list[Match]
    note: str | None = None


@dataclass(frozen=True)
class Found:
    """One document found: its id, its score, where it fits, and its other fields, shortened."""

    id: str
    score: float
    snippet: str
    fields: dict[str, Any] | None = None


@dataclass(frozen=True)
class Hits:
    """What `search` answers: the best first, of so many documents that the index has."""

    documents: int
    hits: list[Found]
    note: str | None = None


def as_json(value: object) -> str:
    """A result, or a part of one, in as few characters as JSON allows."""
    return pydantic_core.to_json(value, exclude_none=True).decode()


def fitted(
    rows: Sequence[Row],
    answer: Callable[[list[Row], str | None], Answer],
    *,
    most_chars: int,
    notes: Sequence[str],
    hint: str,
    brief: Callable[[Row], Row] = lambda row: row,
) -> Answer:
    """The answer with the rows, from the first, that its JSON has room for.

    Args:
        rows: all of them.
        answer: makes it of rows and a note.
        most_chars: characters of its JSON.
        notes: what it says in any case.
        hint: what to do when rows are shortened or left out.
        brief: makes a shorter row in place of one that has no room.
    """

    def note(briefer: int, left: int) -> str | None:
        cut = f"{briefer} shortened and {left} left out, to answer in {most_chars} characters: "
        return " ".join([*notes, *([cut + hint] if briefer or left else [])]) or None

    whole = answer(list(rows), note(0, 0))
    if len(as_json(whole)) <= most_chars:
        return whole
    room = most_chars - len(as_json(answer([], note(len(rows), len(rows)))))
    kept: list[Row] = []
    briefer = 0
    for row in rows:
        fitting = [one for one in (row, brief(row)) if len(as_json(one)) < room]
        if not fitting:
            continue  # a shorter one may have room
        kept.append(fitting[0])
        briefer += fitting[0] is not row
        room -= len(as_json(fitting[0])) + 1  # and a comma
    return answer(kept, note(briefer, len(rows) - len(kept)))


def encoded(vector: Vectors, encoding: Encoding) -> list[float] | str:
    """A vector [D] as a model may carry it."""
    if encoding == "preview":
        return [round(float(number), 4) for number in vector[:_PREVIEW]]
    raw = quantize(vector, "ubinary") if encoding == "binary" else vector.astype("<f4")
    return base64.b64encode(np.ascontiguousarray(raw).tobytes()).decode()


def without_vector(row: EmbeddedText) -> EmbeddedText:
    """The same, without its vector."""
    return replace(row, vector=None)


def without_fields(row: Found) -> Found:
    """The same, without its fields."""
    return replace(row, fields=None)


def found(id: str, score: float, snippet: str, fields: dict[str, Any]) -> Found:  # noqa: A002
    """A hit of an index, shortened."""
    brief = {name: _brief(value) for name, value in fields.items() if value is not None}
    return Found(id, round(score, 4), shortened(snippet), brief or None)


def shortened(text: str, most: int = _TEXT_CHARS) -> str:
    """A text, or its beginning and an ellipsis."""
    return text if len(text) <= most else f"{text[: most - 1].rstrip()}…"


def told(error: Exception) -> str:
    """An error for a model to read."""
    return shortened(str(error), _ERROR_CHARS)


def _brief(value: Any) -> Any:
    if isinstance(value, (bool, int)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return shortened(str(value), _FIELD_CHARS)
