# SPDX-License-Identifier: Apache-2.0
"""The way a request travels: the interface, the choice by url, and a fake that needs no server.

    Transport ◀── GrpcTransport       AsyncTransport ◀── AsyncGrpcTransport      _grpc.py
              ◀── HttpTransport                      ◀── AsyncHttpTransport      _http.py
              ◀── FakeTransport                      ◀── AsyncFakeTransport      here

A transport sends one request once: retries, splitting and order are the clients' work. It raises
nothing but this package's errors. The network's modules are imported when a url asks for them.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, ThreadPoolExecutor, wait
from typing import Any, TypeAlias

import numpy as np

from arrowhead_client._errors import UnexpectedResponse
from arrowhead_client._info import Config
from arrowhead_client._plan import Answer, Request
from arrowhead_client._url import parse_url

PROMPT_PARAMETER = "prompt."  # in `config.pbtxt`, in front of a prompt's name
_MOST_TOKENS = 256  # read by the model of `FakeTransport`

Pause: TypeAlias = Callable[[float], None]
Task: TypeAlias = Callable[[Pause], Answer]


class Transport(ABC):
    """The blocking way to a server. Safe to use from several threads."""

    @abstractmethod
    def infer(self, request: Request, timeout_s: float) -> Answer:
        """The outputs of one request, each an array with its name.

        Args:
            request: what to send.
            timeout_s: seconds for the whole request, connecting and reading included.

        Raises:
            ServerError: any of its kinds.
        """

    @abstractmethod
    def is_ready(self, model: str, timeout_s: float) -> bool:
        """Whether the server and this model say that they are ready; may raise as `infer` does."""

    @abstractmethod
    def width(self, model: str, timeout_s: float) -> int:
        """D, from the model's metadata; may raise as `infer` does."""

    @abstractmethod
    def config(self, model: str, timeout_s: float) -> Config:
        """What the model's configuration says; may raise as `infer` does."""

    @abstractmethod
    def close(self) -> None:
        """Gives the connections back; requests in flight end with an error."""

    def run(self, tasks: Iterable[Task], concurrency: int) -> Iterator[tuple[int, Answer]]:
        """The tasks' results with their indices, as they come; at most `concurrency` at once.

        The first failure is raised, at once: tasks not begun never begin, and a task that pauses
        before a retry gives up. (What is on the wire then is left to its timeout.)

        Args:
            tasks: each is called with a function that pauses it for some seconds.
            concurrency: tasks at once.
        """
        stopped = threading.Event()

        def pause(seconds: float) -> None:
            if stopped.wait(seconds):
                raise CancelledError

        pool = ThreadPoolExecutor(concurrency, thread_name_prefix="arrowhead")
        todo = iter(enumerate(tasks))
        running: dict[Future[Answer], int] = {}
        try:
            while True:
                # Never more submitted than run: a long list stays a list, not a queue of futures.
                while len(running) < concurrency and (job := next(todo, None)) is not None:
                    running[pool.submit(job[1], pause)] = job[0]
                if not running:
                    return
                for done in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(done), done.result()
        finally:
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)


class AsyncTransport(ABC):
    """`Transport` for asyncio; belongs to one event loop, and is safe to cancel."""

    @abstractmethod
    async def infer(self, request: Request, timeout_s: float) -> Answer:
        """See `Transport.infer`."""

    @abstractmethod
    async def is_ready(self, model: str, timeout_s: float) -> bool:
        """See `Transport.is_ready`."""

    @abstractmethod
    async def width(self, model: str, timeout_s: float) -> int:
        """See `Transport.width`."""

    @abstractmethod
    async def config(self, model: str, timeout_s: float) -> Config:
        """See `Transport.config`."""

    @abstractmethod
    async def close(self) -> None:
        """See `Transport.close`."""


def transport_for(url: str) -> Transport:
    """The transport a url asks for."""
    if parse_url(url).protocol == "grpc":
        from arrowhead_client._grpc import GrpcTransport

        return GrpcTransport(url)
    from arrowhead_client._http import HttpTransport

    return HttpTransport(url)


def async_transport_for(url: str) -> AsyncTransport:
    """`transport_for`, for asyncio."""
    if parse_url(url).protocol == "grpc":
        from arrowhead_client._grpc import AsyncGrpcTransport

        return AsyncGrpcTransport(url)
    from arrowhead_client._http import AsyncHttpTransport

    return AsyncHttpTransport(url)


class FakeTransport(Transport):
    """Answers without a server, for tests: `Client(transport=FakeTransport())`.

    The same text always gets the same vector, of length 1, made from its hash: it means nothing.
    A text has as many tokens as words, and is truncated above 256.

    Args:
        dimension: D.
        answer: answers instead, given the request; may raise, as a server would fail.
        prompts: the model's prompts by name.
        fingerprint: of the space of its vectors.

    Attributes:
        requests: what was asked so far, in order.
        configs_read: how often the configuration was asked for.
    """

    def __init__(
        self,
        dimension: int = 8,
        *,
        answer: Callable[[Request], Answer] | None = None,
        prompts: Mapping[str, str] | None = None,
        fingerprint: str = "0" * 32,
    ) -> None:
        self.dimension = dimension
        self.configs_read = 0
        self._prompts = dict(prompts or {})
        self._fingerprint = fingerprint
        self.requests: list[Request] = []
        self.closed = False
        self._answer = answer

    def infer(self, request: Request, timeout_s: float) -> Answer:
        """What `answer` says, else made-up vectors or counts."""
        self.requests.append(request)
        return (self._answer or self._made_up)(request)

    def is_ready(self, model: str, timeout_s: float) -> bool:
        """True until closed."""
        return not self.closed

    def width(self, model: str, timeout_s: float) -> int:
        """The `dimension` it was made with."""
        return self.dimension

    def config(self, model: str, timeout_s: float) -> Config:
        """The `prompts` it was made with, and version 1."""
        self.configs_read += 1
        return Config(dict(self._prompts), model, 1)

    def close(self) -> None:
        """Remembers that it was closed."""
        self.closed = True

    def _made_up(self, request: Request) -> Answer:
        if request.ids:
            vectors = [_vector(ids.tobytes(), self.dimension) for ids in request.ids]
            return {"embeddings": np.stack(vectors)}
        if request.outputs == ("info",):
            return {"info": np.array([[self._info()]], np.object_)}
        words = np.array([[len(text.split())] for text in request.texts], np.int32)
        counted = {"length": np.minimum(words, _MOST_TOKENS), "truncated": words > _MOST_TOKENS}
        if "tokens" in request.outputs:
            return {**counted, **_words(request.texts)}
        vectors = [_vector(text, self.dimension) for text in request.texts]
        return {**counted, "embeddings": np.stack(vectors)}

    def _info(self) -> bytes:
        ranges = np.array([[-1.0], [1.0]], "<f4").repeat(self.dimension, axis=1)
        told: dict[str, Any] = {
            "dimension": self.dimension,
            "max_seq_length": _MOST_TOKENS,
            "normalize": True,
            "fingerprint": self._fingerprint,
            "ranges": base64.b64encode(ranges.tobytes()).decode(),
        }
        return json.dumps(told).encode()


class AsyncFakeTransport(AsyncTransport):
    """`FakeTransport` for `AsyncClient`; wraps one, which holds `requests`."""

    def __init__(self, fake: FakeTransport | None = None) -> None:
        self.fake = fake or FakeTransport()

    async def infer(self, request: Request, timeout_s: float) -> Answer:
        """See `FakeTransport.infer`."""
        return self.fake.infer(request, timeout_s)

    async def is_ready(self, model: str, timeout_s: float) -> bool:
        """See `FakeTransport.is_ready`."""
        return self.fake.is_ready(model, timeout_s)

    async def width(self, model: str, timeout_s: float) -> int:
        """See `FakeTransport.width`."""
        return self.fake.width(model, timeout_s)

    async def config(self, model: str, timeout_s: float) -> Config:
        """See `FakeTransport.config`."""
        return self.fake.config(model, timeout_s)

    async def close(self) -> None:
        """See `FakeTransport.close`."""
        self.fake.close()


def config_in(parameters: Mapping[str, str], steps: Iterable[tuple[str, int]]) -> Config:
    """What a model's configuration says.

    Args:
        parameters: its own; those called `prompt.<name>` are its prompts.
        steps: name and version of each model that an ensemble chains.
    """
    prompts = {
        key.removeprefix(PROMPT_PARAMETER): value
        for key, value in parameters.items()
        if key.startswith(PROMPT_PARAMETER)
    }
    for name, version in steps:
        for ending in ("_tokenizer", "_encoder"):
            if name.endswith(ending) and version > 0:
                return Config(prompts, name.removesuffix(ending), version)
    return Config(prompts)


def embedding_width(shapes: dict[str, Sequence[int]], server: str, model: str) -> int:
    """D, from the shapes of a model's outputs as its metadata tells them."""
    shape = shapes.get("embeddings")
    if not shape or shape[-1] < 1:
        raise UnexpectedResponse(
            f"{server}: model {model!r} has no output 'embeddings' of fixed width (met {shapes}). "
            "Is it a model that `arrowhead convert` made?"
        )
    return int(shape[-1])


def _words(texts: Sequence[bytes]) -> Answer:
    """The words of B texts as tokens: ids and names [B, S], offsets [B, S, 2]."""
    rows = [list(re.finditer(r"\S+", text.decode()))[:_MOST_TOKENS] for text in texts]
    shape = len(rows), max(map(len, rows))
    tokens, offsets = np.full(shape, "", np.object_), np.zeros((*shape, 2), np.int32)
    for row, words in enumerate(rows):
        tokens[row, : len(words)] = [word.group() for word in words]
        offsets[row, : len(words)] = np.reshape([word.span() for word in words], (-1, 2))
    return {"input_ids": np.ones(shape, np.int32), "tokens": tokens, "offsets": offsets}


def _vector(text: bytes, dimension: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    seed = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")
    vector = np.random.default_rng(seed).standard_normal(dimension).astype(np.float32)
    unit: np.ndarray[tuple[int, ...], np.dtype[np.float32]] = vector / np.linalg.norm(vector)
    return unit
