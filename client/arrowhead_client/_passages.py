# SPDX-License-Identifier: Apache-2.0
"""Long texts as passages: of a few sentences each, and never more than the model reads.

One vector says little of a long text, whatever the model could read of it: on SciFact, whose
documents have some 1,500 characters, passages find more than whole documents do
(perf/results/search.md).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from arrowhead_client._client import Client
from arrowhead_client._errors import InvalidInput

MOST_CHARS = 1000  # of a passage: about 190 tokens of English; with 700, less is found
# After a full stop and blanks, after a line's end, after a full stop of a language without blanks.
_SENTENCE = re.compile(r"(?<=[.!?…])\s+|\n+|(?<=[\u3002\uff01\uff1f])")


def split(client: Client, texts: Sequence[str], prompt: str) -> list[list[str]]:
    """The passages of each text, at least one; together they are the text.

    They end where a sentence does, if they can, and else after a word.

    Args:
        client: asked how much the model reads.
        texts: to be split.
        prompt: will be put in front of each passage, and takes room.

    Raises:
        InvalidInput: the prompt leaves no room for a text.
        ServerError: as for `Client.embed`.
    """
    if prompt and client.count_tokens(["a"], prompt=prompt).truncated.any():
        raise InvalidInput(
            f"the model's prompt for documents, {prompt!r:.80}, is as long as what it reads: no "
            "text has room behind it. Serve the model with a shorter one"
        )
    passages = [list(_pieces(text, MOST_CHARS)) for text in texts]
    # Few characters may still be many tokens, in scripts or code that the tokenizer knows little.
    doubtful = [(row, place) for row, some in enumerate(passages) for place in range(len(some))]
    while doubtful:
        counts = client.count_tokens([passages[r][p] for r, p in doubtful], prompt=prompt)
        too_long = {
            where
            for where, more in zip(doubtful, counts.truncated.tolist(), strict=True)
            if more and len(passages[where[0]][where[1]]) > 1
        }
        doubtful = []
        for row in sorted({row for row, _ in too_long}):
            shorter: list[str] = []
            for place, passage in enumerate(passages[row]):
                if (row, place) not in too_long:
                    shorter.append(passage)
                    continue
                for piece in _pieces(passage, -(-len(passage) // 2)):
                    doubtful.append((row, len(shorter)))
                    shorter.append(piece)
            passages[row] = shorter
    return passages


def _pieces(text: str, most: int) -> Iterator[str]:
    """Pieces of at most so many characters, of like length."""
    start = 0
    while (left := len(text) - start) > most:
        aim = start + -(-left // -(-left // most))
        found = _SENTENCE.finditer(text, start + most // 4, start + most)
        ends = [end.end() for end in found if end.end() > start]  # an end may be of no width
        if ends:
            stop = min(ends, key=lambda end: abs(end - aim))
        else:
            stop = text.rfind(" ", start + most // 4, aim) + 1 or aim
        yield text[start:stop]
        start = stop
    yield text[start:]
