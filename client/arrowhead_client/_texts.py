# SPDX-License-Identifier: Apache-2.0
"""Texts as Triton's BYTES: of each its length, uint32 little-endian, and then its UTF-8."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import numpy as np
import numpy.typing as npt


class PackedTexts(Sequence[bytes]):
    """N texts that lie packed in one buffer already, so that a request takes a piece of it.

    Args:
        raw: the buffer.
        starts: int64 [N + 1], where each text's length begins in it, and where the last text ends.
    """

    def __init__(self, raw: memoryview, starts: npt.NDArray[np.int64]) -> None:
        self._raw, self._starts = raw, starts

    def __len__(self) -> int:
        """N."""
        return len(self._starts) - 1

    @overload
    def __getitem__(self, index: int) -> bytes: ...
    @overload
    def __getitem__(self, index: slice) -> PackedTexts: ...
    def __getitem__(self, index: int | slice) -> bytes | PackedTexts:
        """The UTF-8 of one text, or neighbouring texts over the same buffer."""
        places = range(len(self))[index]
        if isinstance(places, int):
            return bytes(self._raw[self._starts[places] + 4 : self._starts[places + 1]])
        if places.step != 1:
            raise ValueError(f"a step of {places.step}: wanted neighbouring texts, in order")
        return PackedTexts(self._raw, self._starts[places.start : places.start + len(places) + 1])

    def packed(self) -> bytes:
        """All of them, as the content of a tensor."""
        return bytes(self._raw[self._starts[0] : self._starts[-1]])


def packed(texts: Sequence[bytes]) -> bytes:
    """The content of a BYTES tensor that holds these texts."""
    if isinstance(texts, PackedTexts):
        return texts.packed()
    parts = [b""] * (2 * len(texts))
    parts[::2] = [len(text).to_bytes(4, "little") for text in texts]
    parts[1::2] = texts
    return b"".join(parts)
