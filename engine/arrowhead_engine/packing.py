# SPDX-License-Identifier: Apache-2.0
"""Ragged token ids -> steps of packed tokens, and the index that attention may need.

Texts are sorted by length and their real tokens laid end to end: T rows, no padding, so that all
linear layers work on real tokens only. Attention alone needs one text's tokens side by side. Where
a kernel takes them as they lie it is told where each text starts; elsewhere texts of similar length
form a group, padded to the longest of them:

    texts   [a a a] [b b b b] [c c c c c c c c c]        T = 16 rows, and maybe a tail
    starts  0       3         7                  16
    groups  {a, b}: 2 x 4, one padded place              {c}: 1 x 9
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

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
class Run:
    """Texts that go through the network together, shortest first.

    Attributes:
        rows: their ids, int32 [B] arrays of any length. lengths: int64 [B], of each.
        order: int64 [B], for each text its place in the caller's list.
    """

    rows: Sequence[Ids]
    lengths: npt.NDArray[np.int64]
    order: npt.NDArray[np.int64]

    @property
    def tokens(self) -> int:
        """How many there are in all texts."""
        return int(self.lengths.sum())

    def block(self, tokens: int, texts: int, *, pinned: bool = False) -> Tensor:
        """All that a step is made of, int32 in one piece, so that a GPU gets it in one copy.

        Args:
            tokens: T, with a tail of zeros after the real ones.
            texts: B; those that are not there share the tail, the last of them has some of it.
            pinned: in memory that a GPU reads by itself.
        """
        block = torch.empty(2 * tokens + texts + 1, dtype=torch.int32, pin_memory=pinned)
        flat, real, own = block.numpy(), self.tokens, len(self.rows)
        input_ids, positions, starts = np.split(flat, [tokens, 2 * tokens])
        np.concatenate(self.rows, out=input_ids[:real])  # the copy ends the borrow of the rows
        input_ids[real:] = positions[real:] = starts[0] = 0
        np.cumsum(self.lengths, out=starts[1 : own + 1])
        positions[:real] = np.arange(real) - np.repeat(starts[:own], self.lengths)
        if texts > own:
            shares = texts - own
            starts[own + 1 :] = real + np.arange(1, shares + 1) * (tokens - real) // shares
        return block


@dataclass(frozen=True)
class Step:
    """What goes through the network at once.

    Attributes:
        input_ids: int32 [T], the real tokens, then a tail of zeros.
        positions: int32 [T], each token's place in its text.
        starts: int32 [B + 1], the row of each text's first token; then where the last text ends.
        longest: no text has more tokens.
        real: rows whose vectors are wanted.
        lengths: int64 [B], tokens of each text, ascending; empty if they are known to `starts`
            only.
    """

    input_ids: Tensor
    positions: Tensor
    starts: Tensor
    longest: int
    real: int
    lengths: npt.NDArray[np.int64]

    @classmethod
    def of(cls, run: Run, device: torch.device) -> Step:
        """The step of those texts, on a device."""
        cuda, tokens = device.type == "cuda", run.tokens
        rows = tokens if cuda else _rounded(tokens)
        block = run.block(rows, len(run.rows), pinned=cuda).to(device, non_blocking=True)
        return cls.over(block, rows, int(run.lengths[-1]), tokens, run.lengths)

    @classmethod
    def over(
        cls, block: Tensor, rows: int, longest: int, real: int, lengths: npt.NDArray[np.int64]
    ) -> Step:
        """The step whose tensors are views of a `Run.block` of so many rows."""
        input_ids, positions = block[:rows], block[rows : 2 * rows]
        return cls(input_ids, positions, block[2 * rows :], longest, real, lengths)

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """All texts, in order, in groups."""
        first_row, device = np.cumsum(self.lengths) - self.lengths, self.input_ids.device
        return tuple(
            _group(self.lengths[a:b], int(first_row[a]), device) for a, b in _similar(self.lengths)
        )


def runs(ids: Sequence[Ids], token_budget: int) -> Iterator[Run]:
    """Splits the texts into runs of at most `token_budget` tokens (a longer text is one alone)."""
    lengths = np.fromiter((len(row) for row in ids), np.int64, len(ids))
    # Stable, so that equal texts keep their order and a step's content does not depend on luck.
    order = np.argsort(lengths, kind="stable")
    for first, last in _cuts(lengths[order], token_budget):
        own = order[first:last]
        yield Run([ids[i] for i in own], lengths[own], own)


def _cuts(lengths: npt.NDArray[np.int64], token_budget: int) -> Iterator[tuple[int, int]]:
    first, tokens = 0, 0
    for i, length in enumerate(lengths):
        if i > first and tokens + length > token_budget:
            yield first, i
            first, tokens = i, 0
        tokens += int(length)
    if first < len(lengths):
        yield first, len(lengths)


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
        _sent(gather.ravel(), device),
        _sent(np.flatnonzero(is_real.ravel()), device),
        _sent(is_real[:, None, None, :], device),
    )


def _sent(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    """The array on a device; a GPU fetches it by itself, and nobody waits for what it does."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
