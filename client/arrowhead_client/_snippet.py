# SPDX-License-Identifier: Apache-2.0
"""The place of a text that a query is likeliest answered in, short enough for a list of hits."""

from __future__ import annotations

import re

_WORD = re.compile(r"\w+")
_STEM = 5  # characters of a word that count: "inhibits" is found by "inhibition"
_SHORTEST = 3  # characters of a word that counts at all


def snippet(text: str, query: str, length: int = 240) -> str:
    """A piece of at most `length` characters, on one line, with "…" where text was left out.

    The piece that holds most of the query's different words, by their beginnings; of equal ones the
    first, so of a text without any its beginning.
    """
    flat = " ".join(text.split())
    if len(flat) <= length:
        return flat
    room = length - 2
    wanted = set(_stems(query).values())
    found = {at: stem for at, stem in _stems(flat).items() if stem in wanted}
    start, most = 0, 0
    for at in found:
        # A little of what stands before a word tells what it is about.
        begin = max(0, min(at - room // 4, len(flat) - room))
        held = {stem for place, stem in found.items() if begin <= place < begin + room}
        if len(held) > most:
            start, most = begin, len(held)
    return _whole_words(flat, start, start + room)


def _stems(text: str) -> dict[int, str]:
    """Where words begin, and with what."""
    return {
        word.start(): word.group().casefold()[:_STEM]
        for word in _WORD.finditer(text)
        if len(word.group()) >= _SHORTEST
    }


def _whole_words(text: str, start: int, stop: int) -> str:
    """`text[start:stop]`, less the words that it would break, if there is any other."""
    if start > 0 and text[start - 1] != " ":
        blank = text.find(" ", start, stop)
        start = blank + 1 if blank >= 0 else start
    if stop < len(text) and text[stop] != " ":
        blank = text.rfind(" ", start, stop)
        stop = blank if blank > start else stop
    return ("…" if start > 0 else "") + text[start:stop].strip() + ("…" if stop < len(text) else "")
