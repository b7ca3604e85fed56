# SPDX-License-Identifier: Apache-2.0
"""Callers of a stack, by every way into it, who know the right answer to each of their requests.

Nobody here tries again: what one request meets is what is counted.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import aiohttp
import numpy as np
import orjson

from arrowhead_client import ArrowheadError, AsyncClient
from deploy.stack import Stack
from perf.quality import engine_vectors
from perf.stats import Vectors
from perf.texts import Texts, blanks

# From the engine's own vector, which has length 1: less is a cosine of 0.9999 and the right length.
# MiniLM is nearer in any dtype but int8.
NEAR = 0.0141
_DIFFERENT = 300  # texts; what is sent is one of them
_TIMEOUT_S = 40.0  # more than HAProxy and the gateway wait
_WARM = 30  # answers by every way before the clock starts


class Known:
    """Texts and the right vector of each, by version of the model.

    Args:
        repository: has the models.
        versions: of MiniLM.
        words: how many a text has, at least and at most.
    """

    def __init__(
        self, repository: Path, versions: Sequence[int], words: tuple[int, int] = (4, 24)
    ) -> None:
        source = Texts(seed=60)
        self.texts = [source.of_words(*words) for _ in range(_DIFFERENT)]
        self.vectors = {one: engine_vectors(repository, one, self.texts) for one in versions}

    def version(self, places: Sequence[int], met: Vectors) -> int:
        """Whose vectors these are, all of them; 0 if they are of no version, or of several."""
        for version, right in self.vectors.items():
            if met.shape != (len(places), right.shape[1]):
                continue
            if float(np.linalg.norm(met - right[places], axis=1).max()) < NEAR:
                return version
        return 0


class Sent(NamedTuple):
    """One request.

    Attributes:
        road: by which way.
        at: when it was sent, on the monotonic clock.
        took: seconds to its answer or failure.
        version: whose vectors came; 0 if it failed.
        failure: what came in their place, "" if they did; `WRONG` if they are not the right ones.
    """

    road: str
    at: float
    took: float
    version: int
    failure: str


WRONG = "wrong vectors"


_UNSEEN = itertools.count(1)  # of this process: what one scene has asked, caches know in the next


def unseen(text: str) -> str:
    """A text as no cache knows it: blanks behind it change its bytes, and not its tokens."""
    return text + blanks(next(_UNSEEN))


class Requests:
    """What is asked: half of it for the first time, a quarter of it three texts at once."""

    def __init__(self, known: Known) -> None:
        self.known = known
        self._numbers = itertools.count()

    def next(self) -> tuple[list[int], list[str]]:
        """Places of the texts among the known ones, and the texts."""
        number = next(self._numbers)
        places = [(number * 7 + k * 31) % _DIFFERENT for k in range(3 if number % 4 == 0 else 1)]
        texts = [self.known.texts[place] for place in places]
        return places, [unseen(text) for text in texts] if number % 2 else texts


class GatewayRoad:
    """JSON to the gateways."""

    def __init__(self, url: str) -> None:
        self._url = f"{url}/embed"
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(_TIMEOUT_S))

    async def embed(self, texts: list[str]) -> Vectors:
        """The vectors; raises Refused, or what aiohttp does."""
        body = orjson.dumps({"inputs": texts})
        headers = {"Content-Type": "application/json"}
        async with self._session.post(self._url, data=body, headers=headers) as answer:
            content = await answer.read()
            if answer.status != 200:
                raise Refused(f"HTTP {answer.status}", content)
            return np.array(orjson.loads(content), np.float32)

    async def close(self) -> None:
        """Hangs up."""
        await self._session.close()


class TritonRoad:
    """The client of Python callers, over HTTP or gRPC."""

    def __init__(self, url: str) -> None:
        self._client = AsyncClient(url, retries=0, timeout_s=_TIMEOUT_S)

    async def embed(self, texts: list[str]) -> Vectors:
        """The vectors; raises ArrowheadError."""
        return await self._client.embed(texts, progress=False)

    async def close(self) -> None:
        """Hangs up."""
        await self._client.close()


class Refused(Exception):
    """An answer that is no vector."""


class Load:
    """Callers in a closed loop, in a thread of their own, while the context is open.

    Args:
        stack: whom they ask.
        known: the texts.
        callers: by each of the three ways.

    Attributes:
        known: as given.
        done: all requests so far.
    """

    def __init__(self, stack: Stack, known: Known, callers: int = 4) -> None:
        self.known = known
        self.done: list[Sent] = []
        self._roads: dict[str, Callable[[], GatewayRoad | TritonRoad]] = {
            "gateway": lambda: GatewayRoad(stack.gateway_url),
            "Triton HTTP": lambda: TritonRoad(stack.http_url),
            "Triton gRPC": lambda: TritonRoad(stack.grpc_url),
        }
        self._requests, self._callers = Requests(known), callers
        self._ending = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._live, name="faults-load")

    def __enter__(self) -> Load:
        self._thread.start()
        try:
            self.wait_until(self._is_warm, 60.0, "answers by every way")
        except BaseException:
            self._end()
            raise
        self.done.clear()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end()

    def wait(self, seconds: float) -> None:
        """Lets them ask for so long."""
        self._thread.join(seconds)
        if not self._thread.is_alive():
            raise RuntimeError("the callers are gone") from self._error

    def wait_until(self, condition: Callable[[], object], seconds: float, what: str) -> None:
        """Lets them ask until something is so; raises TimeoutError after so many seconds."""
        began = time.monotonic()
        while not condition():
            if time.monotonic() - began > seconds:
                raise TimeoutError(f"waited {seconds:.0f} s for {what}")
            self.wait(0.05)

    def _is_warm(self) -> bool:
        count = Counter(one.road for one in list(self.done) if not one.failure)
        return all(count[road] >= _WARM for road in self._roads)

    def _end(self) -> None:
        self._ending = True
        self._thread.join()

    def _live(self) -> None:
        try:
            asyncio.run(self._ask_all())
        except BaseException as error:  # noqa: BLE001 (told by `wait`)
            self._error = error

    async def _ask_all(self) -> None:
        await asyncio.gather(
            *(self._ask(name) for name in self._roads for _ in range(self._callers))
        )

    async def _ask(self, name: str) -> None:
        road = self._roads[name]()
        try:
            while not self._ending:
                places, texts = self._requests.next()
                began = time.monotonic()
                version, failure = await answered(road, self._requests.known, places, texts)
                took = time.monotonic() - began
                self.done.append(Sent(name, began, took, version, failure))
                if failure:
                    await asyncio.sleep(0.05)  # who is refused at once does not ask in a frenzy
        finally:
            await road.close()


async def answered(
    road: GatewayRoad | TritonRoad, known: Known, places: list[int], texts: list[str]
) -> tuple[int, str]:
    """The version whose vectors came, and ""; or 0, and what came in their place."""
    try:
        met = await road.embed(texts)
    except (ArrowheadError, Refused, aiohttp.ClientError, OSError, asyncio.TimeoutError) as error:
        return 0, f"{type(error).__name__}: {error}"[:200]
    version = known.version(places, met)
    return version, "" if version else WRONG


@dataclass(frozen=True)
class Phase:
    """Requests sent within some seconds.

    Attributes:
        requests, failed: how many.
        p50_ms, p99_ms, worst_ms: of all, failed ones too.
        rate: right answers a second.
    """

    requests: int
    failed: int
    p50_ms: float
    p99_ms: float
    worst_ms: float
    rate: float

    @classmethod
    def of(cls, sent: Sequence[Sent], seconds: float) -> Phase:
        """Of none: NaN."""
        took = [one.took * 1e3 for one in sent] or [float("nan")]
        failed = sum(bool(one.failure) for one in sent)
        p50, p99 = np.percentile(took, [50, 99])
        rate = (len(sent) - failed) / max(seconds, 1e-9)
        return cls(len(sent), failed, float(p50), float(p99), max(took), rate)


def failures(sent: Sequence[Sent]) -> Mapping[str, int]:
    """How often what came in the place of an answer, by way; the most frequent first."""
    counts = Counter(f"{one.road}: {one.failure}" for one in sent if one.failure)
    return dict(counts.most_common())
