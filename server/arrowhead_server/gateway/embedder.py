# SPDX-License-Identifier: Apache-2.0
"""`Embedder`: texts to vectors of one version of the model, each text computed once.

    texts ── remembered? under way? ──▶ ids ──▶ lane ── requests of what has gathered ──▶ encoder

Texts are tokenized here, with the served model's own tokenizer: their counts are needed anyway, and
the encoder asked by ids spares Triton a step, and the gateway a second request.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from cachetools import LRUCache

from arrowhead_client import AsyncClient, InvalidInput, ModelInfo, TextTooLong
from arrowhead_engine.tokenizer import Tokenizer

ENTRIES = 10_000
PART_TEXTS = 100  # the models' max_batch_size
PART_TOKENS = (
    1024  # about 0.1 s on two cores: so long a short text may wait behind a part of others
)
INTERACTIVE, BULK = 3, 2  # requests to Triton at once: one is computed while the next is on its way
INLINE_CHARACTERS = 20_000  # are tokenized in about 5 ms; more, beside the event loop

Key: TypeAlias = str | tuple[int, ...]


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
    """One version of the model, with a memory, that asks once for what many are waiting for.

    Triton's response cache knows whole requests; this one knows texts, so of a hundred of which one
    is new, one is computed. Belongs to one event loop.

    What fits one request to Triton is interactive, what takes several is bulk. Each kind has a lane
    of its own, so that neither waits in a queue behind the other.

    Args:
        client: asks Triton; stays its owner's.
        info: the version that is asked.
        tokenizer: its own.
        counts: counted on.
        entries: texts remembered, those used last. MiniLM's take 2 KB each.

    Attributes:
        info, tokenizer, counts: as given.
    """

    def __init__(
        self,
        client: AsyncClient,
        info: ModelInfo,
        tokenizer: Tokenizer,
        counts: Counts,
        entries: int = ENTRIES,
    ) -> None:
        self.info = info
        self.tokenizer = tokenizer
        self._client = client
        self.counts = counts
        self._known: LRUCache[Key, Embedded] = LRUCache(entries)
        self._coming: dict[Key, asyncio.Future[Embedded]] = {}
        self._interactive = _Lane(self._ask, INTERACTIVE)
        self._bulk = _Lane(self._ask, BULK)
        self._tasks: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        """How many texts are remembered."""
        return len(self._known)

    async def __call__(self, keys: Sequence[Key]) -> list[Embedded]:
        """What the model says of each text, or of each text's ids, special ones included.

        Raises:
            InvalidInput: ids that the model does not have, or more of them than it reads.
            ServerError: as `AsyncClient.embed_ids`; all who wait for a text get the same one.
        """
        for number, key in enumerate(keys):
            if not isinstance(key, str):
                self._check(number, key)
        found: dict[Key, Embedded] = {}
        waiting: dict[Key, asyncio.Future[Embedded]] = {}
        new: list[Key] = []
        for key in dict.fromkeys(keys):
            if (known := self._known.get(key)) is not None:
                found[key] = known
                continue
            if key not in self._coming:
                new.append(key)
                self._coming[key] = asyncio.get_running_loop().create_future()
            waiting[key] = self._coming[key]
        self.counts.hits += len(found)
        self.counts.merged += len(waiting) - len(new)
        self.counts.misses += len(new)
        if new:
            self._start(new)
        for key, future in waiting.items():
            # A caller who goes away takes nothing from the others who wait.
            found[key] = await asyncio.shield(future)
        return [found[key] for key in keys]

    def _check(self, number: int, ids: tuple[int, ...]) -> None:
        limit = self.info.max_seq_length
        if not ids:
            raise InvalidInput(f"input {number} is empty: wanted token ids, one at least")
        if len(ids) > limit:
            raise TextTooLong(
                f"input {number} has {len(ids)} token ids: wanted {limit} at most; ids are not cut"
            )
        if min(ids) < 0 or max(ids) > self.tokenizer.highest_id:
            raise InvalidInput(
                f"input {number} has ids of {min(ids)}..{max(ids)}: wanted those of the model's "
                f"own tokenizer, 0..{self.tokenizer.highest_id}"
            )

    def _start(self, new: list[Key]) -> None:
        texts = [key for key in new if isinstance(key, str)]
        if sum(map(len, texts)) <= INLINE_CHARACTERS:
            self._queue(new, *self.tokenizer.encode(texts))
        else:
            task = asyncio.create_task(self._start_beside(new, texts))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _start_beside(self, new: list[Key], texts: list[str]) -> None:
        try:
            encoded = await asyncio.to_thread(self.tokenizer.encode, texts)
        except BaseException as error:
            self._failed(new, error)
            raise
        self._queue(new, *encoded)

    def _queue(self, new: list[Key], ids: list[list[int]], truncated: list[bool]) -> None:
        encoded = iter(zip(ids, truncated, strict=True))
        texts = [
            _Text(key, *next(encoded)) if isinstance(key, str) else _Text(key, list(key), False)
            for key in new
        ]
        fits = len(texts) <= PART_TEXTS and sum(len(one.ids) for one in texts) <= PART_TOKENS
        (self._interactive if fits else self._bulk).put(texts)

    async def _ask(self, part: list[_Text]) -> None:
        try:
            vectors = await self._client.embed_ids([one.ids for one in part], served=self.info)
        except BaseException as error:
            self._failed([one.key for one in part], error)
            if not isinstance(error, Exception):
                raise
            return
        for one, vector in zip(part, vectors, strict=True):
            # A row of its own, or one remembered text would hold the memory of its whole part.
            embedded = Embedded(vector.copy(), len(one.ids), one.truncated)
            embedded.vector.flags.writeable = False
            self._known[one.key] = embedded
            self._coming.pop(one.key).set_result(embedded)

    def _failed(self, keys: list[Key], error: BaseException) -> None:
        for key in keys:
            future = self._coming.pop(key)
            if isinstance(error, Exception):
                future.set_exception(error)
                future.exception()  # all who wait may have gone away: nothing to complain of
            else:
                future.cancel()


class _Text(NamedTuple):
    """A text on its way."""

    key: Key
    ids: list[int]
    truncated: bool


class _Lane:
    """Sends what has gathered, at once while few requests are under way, else when one is answered.

    So a caller alone never waits, and of many at the same moment few pay for a request each.

    Args:
        ask: sends one part; raises nothing.
        most: parts under way at once.
    """

    def __init__(self, ask: Callable[[list[_Text]], Coroutine[Any, Any, None]], most: int) -> None:
        self._ask, self._most = ask, most
        self._gathered: deque[_Text] = deque()
        self._under_way: set[asyncio.Task[None]] = set()

    def put(self, texts: list[_Text]) -> None:
        """Takes texts on."""
        self._gathered += texts
        self._send()

    def _send(self) -> None:
        while self._gathered and len(self._under_way) < self._most:
            task = asyncio.create_task(self._ask(self._part()))
            self._under_way.add(task)
            task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._under_way.discard(task)
        if not task.cancelled():
            self._send()

    def _part(self) -> list[_Text]:
        part = [self._gathered.popleft()]
        tokens = len(part[0].ids)
        while self._gathered and len(part) < PART_TEXTS:
            tokens += len(self._gathered[0].ids)
            if tokens > PART_TOKENS:
                break
            part.append(self._gathered.popleft())
        return part
