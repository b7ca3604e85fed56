# SPDX-License-Identifier: Apache-2.0
"""The asyncio client. `_client.py` is its twin, and says what each method does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import numpy.typing as npt

from arrowhead_client._algebra import Precision, Vectors, cosine_similarity
from arrowhead_client._arrow import to_arrow
from arrowhead_client._errors import ClientClosed, ModelNotFound, ServerError, Unavailable
from arrowhead_client._info import Config, ModelFiles, ModelInfo
from arrowhead_client._options import (
    InputType,
    Options,
    Truncate,
    check_lengths,
    longest_end,
)
from arrowhead_client._plan import (
    DEFAULT_RETRIES,
    Answer,
    Experiment,
    Request,
    Rows,
    Settings,
    Texts,
    TokenCounts,
    Tokenized,
    TokenRows,
    carrying,
    encode_ids,
    encode_texts,
    listed,
    progress_bar,
    tokens_of,
    writable,
)
from arrowhead_client._tracing import embedding
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
        self._known_config: Config | None = None
        self._known_ranges: Vectors | None = None

    async def embed(
        self,
        texts: Texts,
        *,
        prompt: str | None = None,
        prompt_name: str | None = None,
        input_type: InputType | None = None,
        truncate: Truncate = "end",
        dimensions: int | None = None,
        normalize: bool = False,
        precision: Precision = "float32",
        progress: bool | None = None,
        request_id: str | None = None,
    ) -> npt.NDArray[Any]:
        """See `Client.embed`."""
        options = Options(
            prompt, prompt_name, input_type, truncate, dimensions, normalize, precision
        )
        vectors = writable(await self._embed(texts, options, progress, request_id))
        return vectors[0] if isinstance(texts, str) else vectors

    async def embed_ids(
        self,
        input_ids: Sequence[Sequence[int]],
        *,
        dimensions: int | None = None,
        normalize: bool = False,
        precision: Precision = "float32",
        served: ModelInfo | None = None,
        request_id: str | None = None,
    ) -> npt.NDArray[Any]:
        """See `Client.embed_ids`."""
        options = Options(dimensions=dimensions, normalize=normalize, precision=precision)
        ids = encode_ids(input_ids)
        with embedding(self.model, request_id):
            some = self._settings.id_requests(ids, served or await self._config())
            requests = carrying(some, request_id)
            return writable(await self._gathered(requests, options, lambda done: None))

    async def embed_arrow(
        self,
        texts: Texts,
        *,
        prompt: str | None = None,
        prompt_name: str | None = None,
        input_type: InputType | None = None,
        truncate: Truncate = "end",
        dimensions: int | None = None,
        normalize: bool = False,
        precision: Precision = "float32",
        progress: bool | None = None,
        request_id: str | None = None,
    ) -> pa.FixedSizeListArray:
        """See `Client.embed_arrow`."""
        options = Options(
            prompt, prompt_name, input_type, truncate, dimensions, normalize, precision
        )
        return to_arrow(await self._embed(texts, options, progress, request_id))

    async def similarity(
        self,
        a: Texts,
        b: Texts | None = None,
        *,
        a_input_type: InputType | None = None,
        b_input_type: InputType | None = None,
    ) -> Vectors:
        """See `Client.similarity`."""
        left = await self._embed(a, Options(input_type=a_input_type))
        if b is None and b_input_type == a_input_type:
            return cosine_similarity(left)
        right = await self._embed(a if b is None else b, Options(input_type=b_input_type))
        return cosine_similarity(left, right)

    async def count_tokens(
        self,
        texts: Texts,
        *,
        prompt: str | None = None,
        prompt_name: str | None = None,
        request_id: str | None = None,
    ) -> TokenCounts:
        """See `Client.count_tokens`."""
        prefix = await self._prefix(Options(prompt, prompt_name))
        some = self._settings.token_requests(encode_texts(texts, prefix))
        requests = carrying(some, request_id)
        rows = TokenRows(requests)
        async with aclosing(self._answers(requests)) as answers:
            async for index, answer in answers:
                rows.put(index, answer)
        return rows.gathered()

    async def tokenize(
        self,
        texts: Texts,
        *,
        prompt: str | None = None,
        prompt_name: str | None = None,
        request_id: str | None = None,
    ) -> list[Tokenized]:
        """See `Client.tokenize`."""
        prefix = await self._prefix(Options(prompt, prompt_name))
        some = self._settings.tokenize_requests(encode_texts(texts, prefix))
        requests = carrying(some, request_id)
        found: dict[int, list[Tokenized]] = {}
        async with aclosing(self._answers(requests)) as answers:
            async for index, answer in answers:
                found[index] = tokens_of(requests[index], answer)
        return [one for index in range(len(requests)) for one in found[index]]

    async def info(self) -> ModelInfo:
        """See `Client.info`."""
        config = await self._config()
        ask = partial(self._transport.infer, self._settings.told_request(config, ("info",)))
        return ModelInfo.told(self.model, config, await self._retried(ask))

    async def files(self, served: ModelInfo) -> ModelFiles:
        """See `Client.files`."""
        request = self._settings.told_request(served, ModelFiles._fields)
        ask = partial(self._transport.infer, request)
        return ModelFiles.told(self.model, await self._retried(ask))

    async def prompts(self) -> dict[str, str]:
        """See `Client.prompts`."""
        if self._known_config is None:
            self._known_config = await self._config()
        return dict(self._known_config.prompts)

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

    async def _config(self) -> Config:
        return await self._retried(partial(self._transport.config, self._settings.model))

    async def _prefix(self, options: Options) -> str | None:
        known = await self.prompts() if options.needs_prompts else {}
        return options.prefix(known, self._settings.model)

    async def _ranges(self, options: Options) -> Vectors | None:
        if options.needs_ranges and self._known_ranges is None:
            self._known_ranges = (await self.info()).ranges
        return self._known_ranges

    async def _embed(
        self,
        texts: Texts,
        options: Options,
        progress: bool | None = None,
        request_id: str | None = None,
    ) -> npt.NDArray[Any]:
        with embedding(self.model, request_id):
            prefix = await self._prefix(options)
            fitting = await self._fitting(texts, prefix, options.truncate, request_id)
            encoded = encode_texts(fitting, prefix)
            some = self._settings.embed_requests(encoded)
            requests = carrying(some, request_id)
            with progress_bar(encoded, requests, progress) as bar:
                return await self._gathered(requests, options, bar.update)

    async def _fitting(
        self, texts: Texts, prefix: str | None, truncate: Truncate, request_id: str | None
    ) -> Texts:
        if truncate == "end":
            return texts
        counts = await self.count_tokens(texts, prompt=prefix, request_id=request_id)
        if truncate == "none":
            check_lengths(counts.length.tolist(), counts.truncated.tolist())
            return texts
        shorter = listed(texts)
        for index in counts.truncated.nonzero()[0].tolist():
            search = longest_end(shorter[index], int(counts.length[index]))
            try:
                candidates = next(search)
                while True:
                    counts = await self.count_tokens(
                        candidates, prompt=prefix, request_id=request_id
                    )
                    candidates = search.send(counts.truncated.tolist())
            except StopIteration as found:
                shorter[index] = found.value
        return shorter

    async def _gathered(
        self, requests: list[Request], options: Options, done: Callable[[int], object]
    ) -> npt.NDArray[Any]:
        rows = Rows(requests, "embeddings", options.edge(await self._ranges(options)))
        async with aclosing(self._answers(requests)) as answers:
            async for index, answer in answers:
                rows.put(index, answer)
                done(len(requests[index]))
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
