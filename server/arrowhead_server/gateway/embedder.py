# SPDX-License-Identifier: Apache-2.0
"""`Embedder`: texts to vectors of one version of the model, each text computed once.

    texts ── remembered? under way? ──▶ ids ──▶ lane ── requests of what has gathered ──▶ encoder

Texts are tokenized here, with the served model's own tokenizer: their counts are needed anyway, and
the encoder asked by ids spares Triton a step, and the gateway a second request.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from contextvars import Context
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias
from weakref import WeakMethod

import numpy as np
import numpy.typing as npt
from cachetools import LRUCache

from arrowhead_client import (
    AsyncClient,
    InvalidInput,
    InvalidRequest,
    ModelInfo,
    ModelNotFound,
    ModelNotReady,
    ServerError,
    TextTooLong,
    TimedOut,
    Unavailable,
)
from arrowhead_engine.tokenizer import Tokenizer
from arrowhead_server.gateway.call import CALL, Call, joined
from arrowhead_server.gateway.spans import Spans

ENTRIES = 10_000
PART_TEXTS = 100  # the models' max_batch_size
PART_TOKENS = (
    1024  # about 0.1 s on two cores: so long a short text may wait behind a part of others
)
INTERACTIVE, BULK = 3, 2  # requests to Triton at once: one is computed while the next is on its way
INLINE_CHARACTERS = 20_000  # are tokenized in about 5 ms; more, beside the event loop

QUIET_S = 1.0  # so long after a short request, one part of long lists goes at a time
NAMED_FROM = 64  # characters or ids; longer keys are remembered by their hash

_OUTCOMES: dict[type[ServerError], str] = {
    Unavailable: "unavailable",
    ModelNotReady: "unavailable",
    ModelNotFound: "unavailable",
    TimedOut: "timeout",
    InvalidRequest: "refused",
}

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
    """Of texts, since the start.

    Attributes:
        hits: were remembered. merged: were asked for by somebody else already. misses: were new.
        tokens, truncated: of those that were answered.
        sent_tokens: that went to Triton.
    """

    hits: int = 0
    merged: int = 0
    misses: int = 0
    tokens: int = 0
    truncated: int = 0
    sent_tokens: int = 0


class Embedder:
    """One version of the model, with a memory, that asks once for what many are waiting for.

    Triton's response cache knows whole requests; this one knows texts, so of a hundred of which one
    is new, one is computed. Belongs to one event loop.

    What fits one request to Triton is interactive, what takes several is bulk. Each kind has a lane
    of its own, so that neither waits in a queue behind the other. Triton takes what it has in turn:
    a short request waits for the parts that are there, so while such come there is one.

    Args:
        client: asks Triton; stays its owner's.
        info: the version that is asked.
        tokenizer: its own.
        counts: counted on.
        entries: texts remembered, those used last. MiniLM's take 2 KB each.
        spans: makes those of its work.
        asked: told how each request to Triton ended, and the seconds that it took.

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
        *,
        spans: Spans | None = None,
        asked: Callable[[str, float], object] = lambda outcome, seconds: None,
    ) -> None:
        self.info = info
        self._spans = spans or Spans()
        self._asked = asked
        self.tokenizer = tokenizer
        self._client = client
        self.counts = counts
        self._known: LRUCache[Key | bytes, Embedded] = LRUCache(entries)
        self._coming: dict[Key, _Coming] = {}
        self._interactive = _Lane(self._ask, self._interactive_parts)
        self._bulk = _Lane(self._ask, self._bulk_parts)
        self._last_interactive = -QUIET_S
        self._tasks: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        """How many texts are remembered."""
        return len(self._known)

    @property
    def waiting(self) -> dict[str, int]:
        """How many texts wait for their turn at Triton, by lane."""
        return {"interactive": len(self._interactive), "bulk": len(self._bulk)}

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
        joining = Queued(CALL.get(), time.time_ns())
        for key in dict.fromkeys(keys):
            if (known := self._known.get(_name(key))) is not None:
                found[key] = known
                continue
            if (coming := self._coming.get(key)) is not None:
                coming.joined.append(joining)
            else:
                new.append(key)
                coming = _Coming(asyncio.get_running_loop().create_future(), [])
                self._coming[key] = coming
            waiting[key] = coming.future
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
            with self._failing(new):
                with self._spans.tokenizing(len(texts)):
                    encoded = self.tokenizer.encode(texts)
                self._queue(new, *encoded)
        else:
            task = asyncio.create_task(self._start_beside(new, texts))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _start_beside(self, new: list[Key], texts: list[str]) -> None:
        with self._failing(new):
            with self._spans.tokenizing(len(texts)):
                encoded = await asyncio.to_thread(self.tokenizer.encode, texts)
            self._queue(new, *encoded)

    def _queue(self, new: list[Key], ids: list[list[int]], truncated: list[bool]) -> None:
        encoded = iter(zip(ids, truncated, strict=True))
        queued = Queued(CALL.get(), time.time_ns())
        texts = [
            _Text(key, *next(encoded), queued)
            if isinstance(key, str)
            else _Text(key, list(key), False, queued)
            for key in new
        ]
        fits = len(texts) <= PART_TEXTS and sum(len(one.ids) for one in texts) <= PART_TOKENS
        if fits:
            self._last_interactive = time.monotonic()
        (self._interactive if fits else self._bulk).put(texts)

    def _interactive_parts(self) -> int:
        return INTERACTIVE

    def _bulk_parts(self) -> int:
        return 1 if time.monotonic() - self._last_interactive < QUIET_S else BULK

    async def _ask(self, part: list[_Text]) -> None:
        with self._failing([one.key for one in part]):
            vectors = await self._vectors(part)
            for one, vector in zip(part, vectors, strict=True):
                # A row of its own, or one remembered text would hold the memory of its whole part.
                embedded = Embedded(vector.copy(), len(one.ids), one.truncated)
                embedded.vector.flags.writeable = False
                self._known[_name(one.key)] = embedded
                self._coming.pop(one.key).future.set_result(embedded)

    async def _vectors(self, part: list[_Text]) -> npt.NDArray[np.float32]:
        queued = [text.queued for text in part]
        for text in part:
            queued += self._coming[text.key].joined
        by_call: dict[int, Queued] = {}
        for one in queued:
            by_call.setdefault(id(one.call), one)
        calls = [(one.call, one.since) for one in by_call.values() if one.call is not None]
        began, outcome = time.perf_counter(), "other"
        self.counts.sent_tokens += sum(len(one.ids) for one in part)
        try:
            with self._spans.asking(calls, len(part)):
                vectors = await self._client.embed_ids(
                    [one.ids for one in part],
                    served=self.info,
                    request_id=joined(call for call, _ in calls),
                )
            outcome = "ok"
            return vectors
        except ServerError as error:
            outcome = _OUTCOMES.get(type(error), outcome)
            raise
        finally:
            self._asked(outcome, time.perf_counter() - began)

    @contextmanager
    def _failing(self, keys: list[Key]) -> Iterator[None]:
        """What fails reaches those who wait for these texts; nobody waits for ever."""
        try:
            yield
        except BaseException as error:
            for key in keys:
                if (coming := self._coming.pop(key, None)) is None:
                    continue  # it was found before
                future = coming.future
                if isinstance(error, Exception):
                    future.set_exception(error)
                    future.exception()  # all who wait may have gone away: nothing to complain of
                else:
                    future.cancel()
            if not isinstance(error, Exception):
                raise


def _name(key: Key) -> Key | bytes:
    """What a text is remembered by: 10,000 long ones would be gigabytes."""
    if len(key) <= NAMED_FROM:
        return key
    if isinstance(key, str):
        return _hash(key.encode("utf-8", "surrogatepass"), b"text")
    return _hash(np.array(key, np.int64).tobytes(), b"ids")


def _hash(told: bytes, kind: bytes) -> bytes:
    return hashlib.blake2b(told, digest_size=32, person=kind).digest()


@dataclass(frozen=True, eq=False)
class Queued:
    """Texts of one request, that came at once.

    Attributes:
        call: the request; None: the gateway's own.
        since: when, in nanoseconds.
    """

    call: Call | None
    since: int


class _Coming(NamedTuple):
    """A text that is under way, and who asked for it after the first."""

    future: asyncio.Future[Embedded]
    joined: list[Queued]


class _Text(NamedTuple):
    """A text on its way."""

    key: Key
    ids: list[int]
    truncated: bool
    queued: Queued


class _Lane:
    """Sends what has gathered, at once while few requests are under way, else when one is answered.

    So a caller alone never waits, and of many at the same moment few pay for a request each.

    Args:
        ask: sends one part; raises nothing. A method of the lane's owner, as `most` is.
        most: parts under way at once, now.
    """

    def __init__(
        self, ask: Callable[[list[_Text]], Coroutine[Any, Any, None]], most: Callable[[], int]
    ) -> None:
        # Weakly: in a cycle with its lanes, an embedder of a version that is served no more would
        # keep its memory until Python looks for cycles among everything, which it rarely does.
        self._ask, self._most = WeakMethod(ask), WeakMethod(most)
        self._gathered: deque[_Text] = deque()
        self._under_way: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        """How many texts wait."""
        return len(self._gathered)

    def put(self, texts: list[_Text]) -> None:
        """Takes texts on."""
        self._gathered += texts
        self._send()

    def _send(self) -> None:
        ask, most = self._ask(), self._most()
        if ask is None or most is None:
            return  # the owner is gone, so nobody waits for what has gathered
        while self._gathered and len(self._under_way) < most():
            # Not in the context of the request that happens to be here: it is of several.
            task = Context().run(asyncio.create_task, ask(self._part()))
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
