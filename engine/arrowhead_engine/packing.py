# SPDX-License-Identifier: Apache-2.0
"""Ragged token ids -> steps of packed tokens, and the index that attention needs.

Texts are sorted by length and their real tokens laid end to end: T rows, no padding, so that all
linear layers work on real tokens only. Attention alone needs one text's tokens side by side; for
it, texts of similar length form a group, padded to the longest of them:

    texts   [a a a] [b b b b] [c c c c c c c c c]        T = 16 rows, and maybe a tail
    groups  {a, b}: 2 x 4, one padded place              {c}: 1 x 9
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from arrowhead_engine.spec import Ids

# A group may be padded to this many times its real tokens before a new one is opened, since a
# further group costs a kernel launch per layer; tiny ones are always worth merging.
MOST_PADDING = 1.25
SMALL_GROUP = 64  # tokens

# A step's rows are rounded up to one of `SIZES_PER_OCTAVE` sizes between any T and 2T. oneDNN
# compiles its products for each number of rows it meets (4 ms for MiniLM's) and keeps them (half a
# megabyte): with rows as they come, nearly every batch would be a new size.
SIZES_PER_OCTAVE = 8


@dataclass(frozen=True)
class Group:
    """Texts that attend side by side: rows `start` to `stop` of the packed tokens.

    Attributes:
        start, stop: the group's rows.
        texts: texts in it. length: S, its longest text.
        gather: int64 [texts * S], for each place its packed row counted from `start`; a padded
            place repeats the text's last row. None if nothing is padded.
        scatter: int64 [stop - start], the place of each packed row. None if nothing is padded.
        mask: bool [texts, 1, 1, S], True where a place is real. None if nothing is padded.
    """

    start: int
    stop: int
    texts: int
    length: int
    gather: Tensor | None
    scatter: Tensor | None
    mask: Tensor | None


@dataclass(frozen=True)
class Step:
    """What goes through the network at once.

    Attributes:
        input_ids: int32 [T], the real tokens, then a tail of zeros that belongs to no text.
        positions: int64 [T], each token's place in its text.
        lengths: int64 [B], tokens of each text, ascending.
        real: rows that are no tail.
        groups: all texts, in order.
        order: int64 [B], for each text its place in the caller's list.
    """

    input_ids: Tensor
    positions: Tensor
    lengths: Tensor
    groups: tuple[Group, ...]
    real: int
    order: npt.NDArray[np.int64]


def pack(ids: Sequence[Ids], device: torch.device, token_budget: int) -> Iterator[Step]:
    """Splits the texts into steps of at most `token_budget` tokens (a longer text is one alone)."""
    lengths = np.fromiter((len(row) for row in ids), np.int64, len(ids))
    # Stable, so that equal texts keep their order and a step's content does not depend on luck.
    order = np.argsort(lengths, kind="stable")
    for first, last in _runs(lengths[order], token_budget):
        yield _step(ids, order[first:last], lengths[order[first:last]], device)


def _runs(lengths: npt.NDArray[np.int64], token_budget: int) -> Iterator[tuple[int, int]]:
    first, tokens = 0, 0
    for i, length in enumerate(lengths):
        if i > first and tokens + length > token_budget:
            yield first, i
            first, tokens = i, 0
        tokens += int(length)
    if first < len(lengths):
        yield first, len(lengths)


def _step(
    ids: Sequence[Ids],
    order: npt.NDArray[np.int64],
    lengths: npt.NDArray[np.int64],
    device: torch.device,
) -> Step:
    # One array a text in, one array a step out; the copies end the borrow of the caller's memory.
    real = int(lengths.sum())
    input_ids = np.zeros(_rounded(real), np.int32)
    np.concatenate([ids[i] for i in order], out=input_ids[:real])
    starts = np.cumsum(lengths) - lengths
    positions = np.zeros(len(input_ids), np.int64)
    positions[:real] = np.arange(real) - np.repeat(starts, lengths)
    return Step(
        torch.from_numpy(input_ids).to(device),
        torch.from_numpy(positions).to(device),
        torch.from_numpy(lengths).to(device),
        tuple(_group(lengths[a:b], int(starts[a]), device) for a, b in _similar(lengths)),
        real,
        order,
    )


def _rounded(rows: int) -> int:
    """The next size that steps come in: at most an eighth more, at most 3 rows for small ones."""
    step = max(4, (1 << rows.bit_length()) // (2 * SIZES_PER_OCTAVE))
    return -(-rows // step) * step


def _similar(lengths: npt.NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Runs of ascending lengths whose padding stays within bounds."""
    first, real = 0, 0
    for i, length in enumerate(lengths):
        padded = (i - first + 1) * int(length)
        if i > first and padded > SMALL_GROUP and padded > MOST_PADDING * (real + int(length)):
            yield first, i
            first, real = i, 0
        real += int(length)
    yield first, len(lengths)


def _group(lengths: npt.NDArray[np.int64], start: int, device: torch.device) -> Group:
    texts, longest, real = len(lengths), int(lengths[-1]), int(lengths.sum())
    if texts * longest == real:
        return Group(start, start + real, texts, longest, None, None, None)
    places = np.arange(longest)
    is_real = places < lengths[:, None]  # [texts, S]
    first_row = np.cumsum(lengths) - lengths
    gather = first_row[:, None] + np.minimum(places, lengths[:, None] - 1)
    return Group(
        start,
        start + real,
        texts,
        longest,
        torch.from_numpy(gather.ravel()).to(device),
        torch.from_numpy(np.flatnonzero(is_real.ravel())).to(device),
        torch.from_numpy(is_real[:, None, None, :]).to(device),
    )
