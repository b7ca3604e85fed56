# SPDX-License-Identifier: Apache-2.0
"""Long texts as passages that the model reads whole.

text      |----------------------------------------------------|
passages  |------------------|          as much as the model reads
                        |------------------|      from the last sentence that it had to break
                                     |---------------|
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from arrowhead_client._client import Client

# After a full stop and blanks, after a line's end, after a full stop of a language without blanks.
_SENTENCE = re.compile(r"(?<=[.!?…])\s+|\n+|(?<=[\u3002\uff01\uff1f])")
_CHARS_AT_ONCE = 16_384  # of a text, sent to be counted: more than any model reads of it


def split(client: Client, texts: Sequence[str], prompt: str) -> list[list[str]]:
    """The passages of each text, at least one; the first is what the model reads of the text.

    Where a passage ends within a sentence, the next one begins with that sentence.

    Args:
        client: asks the model.
        texts: to be split.
        prompt: will be put in front of each passage, and takes room.

    Raises:
        ServerError: as for `Client.embed`.
    """
    passages: list[list[str]] = [[] for _ in texts]
    left = [(number, 0) for number in range(len(texts))]
    while left:
        seen = [texts[number][start : start + _CHARS_AT_ONCE] for number, start in left]
        stops = _stops(client, seen, prompt)
        following = []
        for (number, start), text, stop in zip(left, seen, stops, strict=True):
            passages[number].append(text[:stop])
            if start + stop < len(texts[number]):
                following.append((number, start + _next_start(text, stop)))
        left = following
    return passages


def _stops(client: Client, texts: Sequence[str], prompt: str) -> list[int]:
    """How many characters the model reads of each text."""
    stops = [len(text) for text in texts]
    long = client.count_tokens(texts, prompt=prompt).truncated.nonzero()[0].tolist()
    if long:
        for number, read in zip(
            long, client.tokenize([texts[number] for number in long], prompt=prompt), strict=True
        ):
            last = max((token.stop or 0 for token in read.tokens), default=0)
            # A prompt that leaves no room must not stop us.
            stops[number] = max(1, last - len(prompt))
    return stops


def _next_start(text: str, stop: int) -> int:
    """Where the passage after `text[:stop]` begins: in its second half, so that it moves on."""
    half = stop // 2 + 1
    starts = [found.end() for found in _SENTENCE.finditer(text, half, stop)]
    if starts:
        return starts[-1]
    blank = text.rfind(" ", half, stop)
    return blank + 1 if blank >= 0 else stop
