# SPDX-License-Identifier: Apache-2.0
"""`Embedder`: texts to vectors, each text asked for once."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from cachetools import LRUCache

from arrowhead_client import AsyncClient

ENTRIES = 10_000


@dataclass(frozen=True)
class Embedded:
    """What the model says of one text.

    Attributes:
        vector: float32 [D], not to be written to.
        tokens: how many the model reads, special ones included.
        truncated: whether the text has more.
    """

    vector: npt.NDArray[np.float32]
    tokens: int
    truncated: bool


@dataclass
class Counts:
    """Of texts, since the start: remembered, asked for by somebody else already, or new."""

    hits: int = 0
    merged: int = 0
    misses: int = 0


class Embedder:
    """A client that remembers, and that asks once for a text that many are waiting for.

    Triton's response cache knows whole requests; this one knows texts, so of a hundred of which one
    is new, one is computed. Belongs to one event loop.

    Args:
        client: asks Triton; stays its owner's.
        entries: texts remembered, those used last. MiniLM's take 2 KB each.

    Attributes:
        counts: see `Counts`.
    """

    def __init__(self, client: AsyncClient, entries: int = ENTRIES) -> None:
        self.counts = Counts()
        self._client = client
        self._known: LRUCache[str, Embedded] = LRUCache(entries)
        self._coming: dict[str, asyncio.Future[Embedded]] = {}
        self._asking: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        """How many texts are remembered."""
        return len(self._known)

    async def __call__(self, texts: Sequence[str]) -> list[Embedded]:
        """What the model says of each text.

        Raises:
            ArrowheadError: as `AsyncClient.embed`; all who wait for a text get the same one.
        """
        found: dict[str, Embedded] = {}
        waiting: dict[str, asyncio.Future[Embedded]] = {}
        new: list[str] = []
        for text in dict.fromkeys(texts):
            if (known := self._known.get(text)) is not None:
                found[text] = known
                continue
            if text not in self._coming:
                new.append(text)
                self._coming[text] = asyncio.get_running_loop().create_future()
            waiting[text] = self._coming[text]
        self.counts.hits += len(found)
        self.counts.merged += len(waiting) - len(new)
        self.counts.misses += len(new)
        if new:
            # A task of its own: a caller who goes away takes nothing from the others who wait.
            task = asyncio.create_task(self._ask(new))
            self._asking.add(task)
            task.add_done_callback(self._asking.discard)
        for text, future in waiting.items():
            found[text] = await asyncio.shield(future)
        return [found[text] for text in texts]

    async def _ask(self, texts: list[str]) -> None:
        try:
            vectors, counts = await asyncio.gather(
                self._client.embed(texts, progress=False), self._client.count_tokens(texts)
            )
        except Exception as error:  # noqa: BLE001 (those who wait raise it)
            for text in texts:
                future = self._coming.pop(text)
                future.set_exception(error)
                future.exception()  # all who wait may have gone away: nothing to complain of
            return
        vectors.flags.writeable = False
        for text, vector, tokens, truncated in zip(
            texts, vectors, counts.length.tolist(), counts.truncated.tolist(), strict=True
        ):
            # A row of its own, or one remembered text would hold the memory of its whole batch.
            embedded = Embedded(vector.copy(), tokens, truncated)
            embedded.vector.flags.writeable = False
            self._known[text] = embedded
            self._coming.pop(text).set_result(embedded)
