# SPDX-License-Identifier: Apache-2.0
"""`Options`: what a caller may want of texts and vectors, whichever road they come by."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from arrowhead_client._algebra import (
    Precision,
    Vectors,
    normalize,
    quantize,
    truncate_dimensions,
)
from arrowhead_client._errors import InvalidInput, TextTooLong

Truncate: TypeAlias = Literal["end", "start", "none"]
InputType: TypeAlias = Literal["query", "document"]
Edge: TypeAlias = Callable[[npt.NDArray[Any]], npt.NDArray[Any]]

# What models call the prompt of a question and of what it is asked of; the first that is there.
_NAMES: dict[str, tuple[str, ...]] = {
    "query": ("query", "search_query", "s2p_query"),
    "document": ("document", "passage", "search_document", "corpus"),
}
_MOST_CHARS_PER_TOKEN = 64  # the tokenizers read no more of a text
_PROBES = 8  # texts a round, where a text's end is sought
_LONGEST_WORD = 32  # characters; more without a blank is no word, or a language without blanks


@dataclass(frozen=True)
class Options:
    """What is wanted of each text and each vector.

    Attributes:
        prompt: put in front of each text.
        prompt_name: in place of it, the name of one that the model brings.
        input_type: in place of both, what the texts are: the model's prompt for a "query" or for a
            "document", or none if it has none.
        truncate: which side of a text that is too long is cut; "none" makes it an error.
        dimensions: how many components to keep, then scaled to length 1; None: all.
        normalize: scale to length 1, whatever the model does.
        precision: what components are given as; see `quantize`.

    Raises:
        InvalidInput: one is out of its range, or two exclude each other.
    """

    prompt: str | None = None
    prompt_name: str | None = None
    input_type: InputType | None = None
    truncate: Truncate = "end"
    dimensions: int | None = None
    normalize: bool = False
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        for name in ("prompt", "prompt_name"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise InvalidInput(f"{name} is {type(value).__name__}: wanted str or None")
        ways = {
            name: getattr(self, name)
            for name in ("prompt", "prompt_name", "input_type")
            if getattr(self, name) is not None
        }
        if len(ways) > 1:
            told = " and ".join(f"{name}={value!r}" for name, value in ways.items())
            raise InvalidInput(f"{told}: give one of them")
        for name, kind in (("truncate", Truncate), ("precision", Precision)):
            one_of(name, getattr(self, name), kind)
        if self.input_type is not None:
            one_of("input_type", self.input_type, InputType)
        if self.dimensions is not None:
            check_whole("dimensions", self.dimensions, 1, None)

    @property
    def needs_prompts(self) -> bool:
        """Whether the model's prompts must be known."""
        return self.prompt_name is not None or self.input_type is not None

    @property
    def needs_ranges(self) -> bool:
        """Whether the model's ranges must be known."""
        return self.precision in ("int8", "uint8")

    def prefix(self, known: Mapping[str, str], model: str) -> str | None:
        """What is put in front of each text.

        Args:
            known: the model's prompts by name, if `needs_prompts`.
            model: its name, for the error.

        Raises:
            InvalidInput: the model has no prompt of that name; lists those it has.
        """
        if self.input_type is not None:
            fitting = (name for name in _NAMES[self.input_type] if name in known)
            return known.get(next(fitting, ""))
        if self.prompt_name is None:
            return self.prompt
        if self.prompt_name not in known:
            names = ", ".join(map(repr, known)) or "none"
            raise InvalidInput(
                f"prompt_name={self.prompt_name!r}: model {model!r} knows {names}. "
                "prompt='...' takes any text."
            )
        return known[self.prompt_name]

    def edge(self, ranges: Vectors | None = None) -> Edge:
        """What is done to vectors [N, D].

        Args:
            ranges: float32 [2, D], if `needs_ranges`.
        """
        if self.precision != "float32":
            return partial(
                quantize, precision=self.precision, ranges=ranges, dimensions=self.dimensions
            )
        if self.dimensions is not None:
            return partial(truncate_dimensions, dimensions=self.dimensions)
        return normalize if self.normalize else partial(np.asarray, dtype=np.float32)


def check_lengths(length: Sequence[int], truncated: Sequence[bool]) -> None:
    """Refuses texts of which the model would not read all.

    Args:
        length: tokens read of each of N texts.
        truncated: of each, whether it has more.

    Raises:
        TextTooLong: names the first.
    """
    for number, (tokens, more) in enumerate(zip(length, truncated, strict=True)):
        if more:
            raise TextTooLong(
                f"text {number} has more than the {tokens} tokens that the model reads; shorten "
                "it, or ask to have it cut"
            )


def longest_end(text: str, limit: int) -> Generator[list[str], Sequence[bool], str]:
    """The longest end of a text that the model reads whole, from the beginning of a word.

    A search that asks: it yields candidates, and is sent for each whether it is too long.

    Args:
        text: one that is too long.
        limit: how many tokens the model reads.
    """
    # What begins at low is too long, at high not.
    low, high = max(0, len(text) - _MOST_CHARS_PER_TOKEN * limit), len(text)
    while high - low > 1:
        places = sorted(
            {low + (high - low) * step // (_PROBES + 1) for step in range(1, _PROBES + 1)} - {low}
        ) or [low + 1]
        too_long = yield [text[place:] for place in places]
        for place, longer in zip(places, too_long, strict=True):
            if not longer:
                high = place
                break
            low = place
    if text[high - 1].isspace():
        return text[high:]
    near = range(high, min(high + _LONGEST_WORD + 1, len(text)))
    blank = next((place for place in near if text[place].isspace()), high - 1)
    return text[blank + 1 :]


def one_of(name: str, value: object, kind: Any) -> None:
    """Refuses what is none of a Literal's values.

    Raises:
        InvalidInput: names them.
    """
    if value not in get_args(kind):
        wanted = ", ".join(map(repr, get_args(kind)))
        raise InvalidInput(f"{name}={value!r}: wanted one of {wanted}")


def check_whole(name: str, value: object, low: int, high: int | None) -> None:
    """Refuses what is no whole number in low..high.

    Raises:
        InvalidInput: says what was met.
    """
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise InvalidInput(f"{name}={value!r}: wanted a whole number")
    if value < low or (high is not None and value > high):
        raise InvalidInput(f"{name}={value}: wanted {low}.." + ("" if high is None else str(high)))
