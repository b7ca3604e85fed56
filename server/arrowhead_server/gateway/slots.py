# SPDX-License-Identifier: Apache-2.0
"""Who may ask Triton now: requests of few texts before parts of long lists.

Triton takes what it is sent in the order in which it comes, so what waits, waits here. It never has
more than `FEW_AT_ONCE` texts of short requests and `bulk_parts` parts of long lists.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import numpy.typing as npt

from arrowhead_client import AsyncTransport, Config, Request, TimedOut

PART = 100  # texts; as many as Triton takes in one request
LEAST_PART = 20  # above FEW, or no part were one of a long list
BULK_PARTS = 1
FEW = 10  # a request of so many texts, or fewer, is one that somebody waits for
FEW_AT_ONCE = 200  # texts; two full batches of Triton's
PATIENCE_S = 1.0  # after so long a part of a long list goes first


class _Waiting(NamedTuple):
    turn: asyncio.Future[None]
    texts: int
    since: float


class Slots:
    """Gives turns. Belongs to one event loop.

    Args:
        bulk_parts: parts of long lists that have their turn at the same time.
        clock: tells seconds.
    """

    def __init__(
        self, bulk_parts: int = BULK_PARTS, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._bulk_parts, self._clock = bulk_parts, clock
        self._few: deque[_Waiting] = deque()
        self._long: deque[_Waiting] = deque()
        self._few_texts = 0
        self._long_parts = 0

    def waiting(self) -> dict[str, int]:
        """How many wait, of each kind."""
        return {"few": len(self._few), "long": len(self._long)}

    @asynccontextmanager
    async def turn(self, texts: int, timeout_s: float) -> AsyncIterator[float]:
        """Waits for a turn of so many texts, and has it; gives the seconds that are left.

        Raises:
            TimedOut: it did not come.
        """
        line = self._few if texts <= FEW else self._long
        waiting = _Waiting(asyncio.get_running_loop().create_future(), texts, self._clock())
        line.append(waiting)
        self._go_on()
        try:
            try:
                if not waiting.turn.done():
                    await asyncio.wait_for(waiting.turn, timeout_s)
            except asyncio.TimeoutError:
                raise TimedOut(f"no turn at Triton within {timeout_s:.3g} s: try later") from None
            yield max(timeout_s - (self._clock() - waiting.since), 0.001)
        finally:
            if waiting in line:  # whoever waited went away
                line.remove(waiting)
            elif not waiting.turn.cancelled():
                if texts <= FEW:
                    self._few_texts -= texts
                else:
                    self._long_parts -= 1
            self._go_on()

    def _go_on(self) -> None:
        while True:
            for line in (self._few, self._long):
                while line and line[0].turn.cancelled():
                    line.popleft()
            if self._long_may_go():
                line, self._long_parts = self._long, self._long_parts + 1
            elif self._few and self._few_texts + self._few[0].texts <= FEW_AT_ONCE:
                line, self._few_texts = self._few, self._few_texts + self._few[0].texts
            else:
                return
            line.popleft().turn.set_result(None)

    def _long_may_go(self) -> bool:
        if not self._long or self._long_parts >= self._bulk_parts:
            return False
        return not self._few or self._clock() - self._long[0].since >= PATIENCE_S


class TakingTurns(AsyncTransport):
    """A transport whose requests for vectors wait for their turn.

    Args:
        transport: sends them; this one closes it.
        slots: gives the turns.
    """

    def __init__(self, transport: AsyncTransport, slots: Slots) -> None:
        self._transport, self._slots = transport, slots

    async def infer(self, request: Request, timeout_s: float) -> Mapping[str, npt.NDArray[Any]]:
        """See `Transport.infer`."""
        if "embeddings" not in request.outputs:  # the tokenizer's, which is quick
            return await self._transport.infer(request, timeout_s)
        async with self._slots.turn(len(request), timeout_s) as left_s:
            return await self._transport.infer(request, left_s)

    async def is_ready(self, model: str, timeout_s: float) -> bool:
        """See `Transport.is_ready`."""
        return await self._transport.is_ready(model, timeout_s)

    async def width(self, model: str, timeout_s: float) -> int:
        """See `Transport.width`."""
        return await self._transport.width(model, timeout_s)

    async def config(self, model: str, timeout_s: float) -> Config:
        """See `Transport.config`."""
        return await self._transport.config(model, timeout_s)

    async def close(self) -> None:
        """See `Transport.close`."""
        await self._transport.close()
