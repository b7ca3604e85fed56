# SPDX-License-Identifier: Apache-2.0
"""The queue before an engine: what is waiting goes in together."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

Vectors = npt.NDArray[np.float32]
MOST_TEXTS = 32


class Batcher:
    """Gathers requests while the engine works, and gives it up to `most` texts at once.

    Nobody is made to wait for company: an idle engine takes a request as it comes. One thread runs
    the engine, which uses all cores; meanwhile the event loop reads and writes.
    """

    def __init__(self, encode: Callable[[list[str]], Vectors], most: int = MOST_TEXTS) -> None:
        self._encode = encode
        self._most = most
        self._waiting: deque[tuple[list[str], asyncio.Future[Vectors]]] = deque()
        self._thread = ThreadPoolExecutor(1)
        self._work: asyncio.Task[None] | None = None

    async def embed(self, texts: list[str]) -> Vectors:
        """The texts' vectors [N, D]; raises what the engine raised."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Vectors] = loop.create_future()
        self._waiting.append((texts, answer))
        if self._work is None or self._work.done():
            self._work = loop.create_task(self._drain())
        return await answer

    async def _drain(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting:
            batch = self._take()
            texts = [text for request, _ in batch for text in request]
            try:
                vectors = await loop.run_in_executor(self._thread, self._encode, texts)
            except Exception as error:  # noqa: BLE001 (whose requests these were must learn of it)
                _answer_all(batch, error)
                continue
            first = 0
            for request, answer in batch:
                if not answer.done():  # its caller may have gone
                    answer.set_result(vectors[first : first + len(request)])
                first += len(request)

    def _take(self) -> list[tuple[list[str], asyncio.Future[Vectors]]]:
        batch = [self._waiting.popleft()]
        count = len(batch[0][0])
        while self._waiting and count + len(self._waiting[0][0]) <= self._most:
            batch.append(self._waiting.popleft())
            count += len(batch[-1][0])
        return batch


def _answer_all(batch: list[tuple[list[str], asyncio.Future[Any]]], error: Exception) -> None:
    for _, answer in batch:
        if not answer.done():
            answer.set_exception(error)
