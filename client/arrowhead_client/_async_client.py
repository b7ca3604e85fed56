# SPDX-License-Identifier: Apache-2.0
"""The asyncio client. `_client.py` is its twin, and says what each method does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

from arrowhead_client._algebra import Vectors, cosine_similarity
from arrowhead_client._errors import ClientClosed, ModelNotFound, ServerError, Unavailable
from arrowhead_client._plan import (
    DEFAULT_RETRIES,
    Answer,
    Experiment,
    Request,
    Rows,
    Settings,
    TokenCounts,
    TokenRows,
    check_prompts,
    encode_texts,
    progress_bar,
    prompt_named,
    to_arrow,
    vector_edge,
)
from arrowhead_client._transports import AsyncTransport, async_transport_for
from arrowhead_client._url import DEFAULT_URL

if TYPE_CHECKING:
    import pyarrow as pa

T = TypeVar("T")


class AsyncClient:
    """`Client` for asyncio: the same arguments, methods, results and errors, awaited.

    >>> async with AsyncClient() as client:                       # doctest: +SKIP
    ...     vectors = await client.embed(["a text", "another"])

    Use it in one event loop. A cancelled call cancels its requests.

    Args:
        url: see `Client`.
        model: see `Client`.
        timeout_s: see `Client`.
        retries: see `Client`.
        concurrency: see `Client`.
        batch_size: see `Client`.
        experiment: see `Client`.
        transport: used in place of `url`, such as an `AsyncFakeTransport()`. The client closes it.

    Raises:
        InvalidUrl: the url cannot be read.
        InvalidInput: another argument is out of its range.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        model: str = "minilm",
        timeout_s: float = 30.0,
        retries: int = DEFAULT_RETRIES,
        concurrency: int = 4,
        batch_size: int = 32,
        experiment: Experiment | None = None,
        transport: AsyncTransport | None = None,
    ) -> None:
        self._settings = Settings(model, timeout_s, retries, concurrency, batch_size, experiment)
        self._open_transport: AsyncTransport | None = transport or async_transport_for(url)
        self._known_prompts: dict[str, str] | None = None

    async def embed(
        self,
        texts: str | Sequence[str],
        *,
        prompt: str | None = None,
        prompt_name: str | None = None,
        dimensions: int | None = None,
        normalize: bool = False,
        progress: bool | None = None,
    ) -> Vectors:
        """See `Client.embed`."""
        vectors = await self._embed(texts, prompt, prompt_name, dimensions, normalize, progress)
        return vectors[0] if isinstance(texts, str) else vectors

    async def embed_arrow(
        self,
        texts: str | Sequence[str],
        *,
        prompt: str | None = None,
        prompt_name: str | None = None,
        dimensions: int | None = None,
        normalize: bool = False,
        progress: bool | None = None,
    ) -> pa.FixedSizeListArray:
        """See `Client.embed_arrow`."""
        return to_arrow(
            await self._embed(texts, prompt, prompt_name, dimensions, normalize, progress)
        )

    async def similarity(
        self, a: str | Sequence[str], b: str | Sequence[str] | None = None
    ) -> Vectors:
        """See `Client.similarity`."""
        left = await self._embed(a)
        return cosine_similarity(left, None if b is None else await self._embed(b))

    async def count_tokens(
        self,
        texts: str | Sequence[str],
        *,
        prompt: str | None = None,
        prompt_name: str | None = None,
    ) -> TokenCounts:
        """See `Client.count_tokens`."""
        prompt = await self._prompt(prompt, prompt_name)
        requests = self._settings.token_requests(encode_texts(texts, prompt))
        rows = TokenRows(requests)
        async with aclosing(self._answers(requests)) as answers:
            async for index, answer in answers:
                rows.put(index, answer)
        return rows.gathered()

    async def prompts(self) -> dict[str, str]:
        """See `Client.prompts`."""
        if self._known_prompts is None:
            read = partial(self._transport.prompts, self._settings.model)
            self._known_prompts = await self._retried(read)
        return dict(self._known_prompts)

    async def ready(self) -> bool:
        """See `Client.ready`."""
        try:
            return await self._transport.is_ready(self._settings.model, self._settings.timeout_s)
        except ServerError:
            return False

    async def close(self) -> None:
        """See `Client.close`."""
        transport, self._open_transport = self._open_transport, None
        if transport is not None:
            await transport.close()

    async def __aenter__(self) -> AsyncClient:
        self._transport  # noqa: B018 (a closed client cannot be entered)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    @property
    def model(self) -> str:
        """See `Client.model`."""
        return self._settings.model

    @property
    def _transport(self) -> AsyncTransport:
        if self._open_transport is None:
            raise ClientClosed("this AsyncClient is closed: make a new one")
        return self._open_transport

    async def _prompt(self, prompt: str | None, prompt_name: str | None) -> str | None:
        check_prompts(prompt, prompt_name)
        if prompt_name is None:
            return prompt
        return prompt_named(prompt_name, await self.prompts(), self._settings.model)

    async def _embed(
        self,
        texts: str | Sequence[str],
        prompt: str | None = None,
        prompt_name: str | None = None,
        dimensions: int | None = None,
        normalize: bool = False,
        progress: bool | None = None,
    ) -> Vectors:
        edge = vector_edge(dimensions, normalize)
        encoded = encode_texts(texts, await self._prompt(prompt, prompt_name))
        requests = self._settings.embed_requests(encoded)
        rows = Rows(requests, "embeddings", edge)
        with progress_bar(encoded, requests, progress) as bar:
            async with aclosing(self._answers(requests)) as answers:
                async for index, answer in answers:
                    rows.put(index, answer)
                    bar.update(len(requests[index].texts))
        if requests:
            return rows.gathered()
        width = partial(self._transport.width, self._settings.model)
        return rows.gathered(await self._retried(width))

    async def _answers(self, requests: list[Request]) -> AsyncGenerator[tuple[int, Answer], None]:
        transport = self._transport
        todo = iter(enumerate(requests))
        running: dict[asyncio.Task[Answer], int] = {}
        try:
            while True:
                while (
                    len(running) < self._settings.concurrency
                    and (job := next(todo, None)) is not None
                ):
                    call = self._retried(partial(transport.infer, job[1]))
                    running[asyncio.create_task(call)] = job[0]
                if not running:
                    return
                done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    yield running.pop(task), task.result()
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    async def _retried(self, call: Callable[[float], Awaitable[T]]) -> T:
        attempts = self._settings.attempts()
        while True:
            try:
                return await call(attempts.remaining_s())
            except ModelNotFound as error:
                raise self._settings.told(error) from error
            except Unavailable as error:
                delay = attempts.delay_after(error)
            await asyncio.sleep(delay)
