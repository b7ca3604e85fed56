# SPDX-License-Identifier: Apache-2.0
"""The blocking client. `_async_client.py` is its twin; what they share is in `_plan.py`."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
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
from arrowhead_client._transports import Pause, Transport, transport_for
from arrowhead_client._url import DEFAULT_URL

if TYPE_CHECKING:
    import pyarrow as pa

T = TypeVar("T")


class Client:
    """Embeds texts on a server. May be shared by threads.

    >>> with Client("grpc://127.0.0.1:8001") as client:          # doctest: +SKIP
    ...     client.embed(["a text", "another"]).shape
    (2, 384)

    A request that meets no server (refused, reset, UNAVAILABLE, 503) is sent again after 0.1 s,
    0.2 s, 0.4 s, and so on up to 2 s, each give or take 25 %: with 8 retries about 9 s in all, so
    a server may restart meanwhile. Nothing else is sent again.

    Args:
        url: `grpc://host[:port]` or `http://host[:port]`.
        model: the model's name on the server.
        timeout_s: seconds for each request, from its first sending to its answer, retries included.
        retries: how often a request that met no server is sent again.
        concurrency: requests of one call in flight at once.
        batch_size: texts in one request, at most 100.
        experiment: gives a share of all callers the model's next version, `<model>_candidate`, such
            as `Experiment(share=0.1, key="agent-7")`; the client's `model` tells which it asks. A
            candidate that is not served is `ModelNotFound`: nothing falls back.
        transport: used in place of `url`, such as `HttpTransport(url, binary=False)` or a
            `FakeTransport()`. The client closes it.

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
        transport: Transport | None = None,
    ) -> None:
        self._settings = Settings(model, timeout_s, retries, concurrency, batch_size, experiment)
        self._open_transport: Transport | None = transport or transport_for(url)
        self._known_config: Config | None = None
        self._known_ranges: Vectors | None = None

    def embed(
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
        """The vectors of the texts, float32: `[N, D]`, or `[D]` for a single string.

        Args:
            texts: a string; a list of N strings; or N strings in Arrow's memory, which are packed
                without a Python object for each: an array or chunks of pyarrow (string,
                large_string, string_view, or a dictionary of them), or what another library
                exports through Arrow's C data interface. No strings give `[0, D]`.
            prompt: put in front of each text, such as `"query: "`, for models trained with prompts.
            prompt_name: in place of `prompt`, the name of one that the model brings, such as
                `"query"`; see `prompts`.
            input_type: in place of both, what the texts are: "query" or "document" takes the
                model's prompt for such, if it has one.
            truncate: which side of a text that the model cannot read whole is cut: its "end"; its
                "start", up to the beginning of a word, the prompt staying; or "none", an error.
            dimensions: cut the vectors to so many components and normalise them (Matryoshka).
            normalize: scale the vectors to length 1, if the model does not do so itself.
            precision: "float32"; or "int8", "uint8", "binary", "ubinary" of the model's own vector
                (cut, not normalised), as `quantize` says, with the ranges of its conversion.
            progress: a bar on stderr: True or False; None shows it on a terminal for a long call.
            request_id: what the logs of gateway and server are to call it: 1 to 128 letters, digits
                and . _ : -

        Raises:
            InvalidInput: a text is no string, or null, or has no UTF-8; `dimensions` is above D; or
                the model has no prompt of that name, or no ranges.
            TextTooLong: the model would not read all of a text, and `truncate` is "none".
            ServerError: the first failure of any request, after its retries; the rest is dropped.
        """
        options = Options(
            prompt, prompt_name, input_type, truncate, dimensions, normalize, precision
        )
        vectors = writable(self._embed(texts, options, progress, request_id))
        return vectors[0] if isinstance(texts, str) else vectors

    def embed_ids(
        self,
        input_ids: Sequence[Sequence[int]],
        *,
        dimensions: int | None = None,
        normalize: bool = False,
        precision: Precision = "float32",
        served: ModelInfo | None = None,
        request_id: str | None = None,
    ) -> npt.NDArray[Any]:
        """The vectors `[N, D]` of N texts that are token ids already, special ones included.

        They go to the encoder directly: no prompt, no cut, no response cache.

        Args:
            input_ids: of each text, as the model's own tokenizer gives them; see `tokenize`.
            dimensions: as for `embed`.
            normalize: as for `embed`.
            precision: as for `embed`.
            served: what `info` told: that very version is asked. Else the live one is asked for
                first.
            request_id: as for `embed`.

        Raises:
            InvalidInput: no list of ids.
            InvalidRequest: an id that the model does not know, or more of them than it reads.
            ServerError: as for `embed`.
        """
        options = Options(dimensions=dimensions, normalize=normalize, precision=precision)
        ids = encode_ids(input_ids)
        with embedding(self.model, request_id):
            some = self._settings.id_requests(ids, served or self._config())
            requests = carrying(some, request_id)
            return writable(self._gathered(requests, options, lambda done: None))

    def embed_arrow(
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
        """`embed` as an Arrow array of N `fixed_size_list<float>[D]`; int8 or uint8 by precision.

        The vectors are not copied for Arrow. Of a call of one request the array lies over the bytes
        of gRPC's answer, or, if they are cut, normalised or quantised, over the result of that. An
        answer over HTTP is copied once, where it lies unaligned behind its head. Of a call of
        several requests each answer is copied once, into its rows of the one array.

        A single string gives an array of one. Arguments and errors are those of `embed`.
        """
        options = Options(
            prompt, prompt_name, input_type, truncate, dimensions, normalize, precision
        )
        return to_arrow(self._embed(texts, options, progress, request_id))

    def similarity(
        self,
        a: Texts,
        b: Texts | None = None,
        *,
        a_input_type: InputType | None = None,
        b_input_type: InputType | None = None,
    ) -> Vectors:
        """The cosine of each text of `a` with each text of `b` (default: of `a`).

        Args:
            a: a text, or several.
            b: likewise.
            a_input_type: what those of `a` are, for the model's prompts, such as "query".
            b_input_type: what those of `b` are, such as "document".

        Returns:
            float32 `[len(a), len(b)]`; a single string counts as one text.

        Raises:
            InvalidInput: as for `embed`.
            ServerError: as for `embed`.
        """
        left = self._embed(a, Options(input_type=a_input_type))
        if b is None and b_input_type == a_input_type:
            return cosine_similarity(left)
        right = self._embed(a if b is None else b, Options(input_type=b_input_type))
        return cosine_similarity(left, right)

    def count_tokens(
        self,
        texts: Texts,
        *,
        prompt: str | None = None,
        prompt_name: str | None = None,
        request_id: str | None = None,
    ) -> TokenCounts:
        """How many tokens the model reads of each text, and whether it reads all of it.

        Returns:
            `length` int32 `[N]` and `truncated` bool `[N]`; a single string counts as one text.

        Raises:
            InvalidInput: as for `embed`.
            ServerError: as for `embed`.
        """
        prefix = self._prefix(Options(prompt, prompt_name))
        some = self._settings.token_requests(encode_texts(texts, prefix))
        requests = carrying(some, request_id)
        rows = TokenRows(requests)
        with closing(self._answers(requests)) as answers:
            for index, answer in answers:
                rows.put(index, answer)
        return rows.gathered()

    def tokenize(
        self,
        texts: Texts,
        *,
        prompt: str | None = None,
        prompt_name: str | None = None,
        request_id: str | None = None,
    ) -> list[Tokenized]:
        """The tokens that the model reads of each text; a single string counts as one text.

        Raises:
            InvalidInput: as for `embed`.
            ServerError: as for `embed`.
        """
        prefix = self._prefix(Options(prompt, prompt_name))
        some = self._settings.tokenize_requests(encode_texts(texts, prefix))
        requests = carrying(some, request_id)
        found: dict[int, list[Tokenized]] = {}
        with closing(self._answers(requests)) as answers:
            for index, answer in answers:
                found[index] = tokens_of(requests[index], answer)
        return [one for index in range(len(requests)) for one in found[index]]

    def info(self) -> ModelInfo:
        """What the served model says of itself. Asks anew at each call.

        Raises:
            ServerError: as for `embed`.
        """
        config = self._config()
        ask = partial(self._transport.infer, self._settings.told_request(config, ("info",)))
        return ModelInfo.told(self.model, config, self._retried(ask, time.sleep))

    def files(self, served: ModelInfo) -> ModelFiles:
        """The files to tokenize texts with as that model does.

        Args:
            served: what `info` told.

        Raises:
            ServerError: as for `embed`; `ModelNotFound` if that version is served no more.
        """
        request = self._settings.told_request(served, ModelFiles._fields)
        ask = partial(self._transport.infer, request)
        return ModelFiles.told(self.model, self._retried(ask, time.sleep))

    def prompts(self) -> dict[str, str]:
        """The prompts that the model was trained with, by name, such as `{"query": "query: "}`.

        Read from the served model's configuration once, when first wanted; later calls give the
        same, whatever is served by then.

        Raises:
            ServerError: as for `embed`.
        """
        if self._known_config is None:
            self._known_config = self._config()
        return dict(self._known_config.prompts)

    def ready(self) -> bool:
        """Whether the server and the model are ready. Asks once; unreachable is False."""
        try:
            return self._transport.is_ready(self._settings.model, self._settings.timeout_s)
        except ServerError:
            return False

    def close(self) -> None:
        """Gives the connections back. Harmless if done twice."""
        transport, self._open_transport = self._open_transport, None
        if transport is not None:
            transport.close()

    def __enter__(self) -> Client:
        self._transport  # noqa: B018 (a closed client cannot be entered)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def model(self) -> str:
        """The name of the model that is asked: `model`, or in an experiment its arm's."""
        return self._settings.model

    @property
    def _transport(self) -> Transport:
        if self._open_transport is None:
            raise ClientClosed("this Client is closed: make a new one")
        return self._open_transport

    def _config(self) -> Config:
        read = partial(self._transport.config, self._settings.model)
        return self._retried(read, time.sleep)

    def _prefix(self, options: Options) -> str | None:
        known = self.prompts() if options.needs_prompts else {}
        return options.prefix(known, self._settings.model)

    def _ranges(self, options: Options) -> Vectors | None:
        if options.needs_ranges and self._known_ranges is None:
            self._known_ranges = self.info().ranges
        return self._known_ranges

    def _embed(
        self,
        texts: Texts,
        options: Options,
        progress: bool | None = None,
        request_id: str | None = None,
    ) -> npt.NDArray[Any]:
        with embedding(self.model, request_id):
            prefix = self._prefix(options)
            fitting = self._fitting(texts, prefix, options.truncate, request_id)
            encoded = encode_texts(fitting, prefix)
            some = self._settings.embed_requests(encoded)
            requests = carrying(some, request_id)
            with progress_bar(encoded, requests, progress) as bar:
                return self._gathered(requests, options, bar.update)

    def _fitting(
        self, texts: Texts, prefix: str | None, truncate: Truncate, request_id: str | None
    ) -> Texts:
        """The texts, so that the model reads each to its end, or may cut it there."""
        if truncate == "end":
            return texts
        counts = self.count_tokens(texts, prompt=prefix, request_id=request_id)
        if truncate == "none":
            check_lengths(counts.length.tolist(), counts.truncated.tolist())
            return texts
        shorter = listed(texts)
        for index in counts.truncated.nonzero()[0].tolist():
            search = longest_end(shorter[index], int(counts.length[index]))
            try:
                candidates = next(search)
                while True:
                    counts = self.count_tokens(candidates, prompt=prefix, request_id=request_id)
                    candidates = search.send(counts.truncated.tolist())
            except StopIteration as found:
                shorter[index] = found.value
        return shorter

    def _gathered(
        self, requests: list[Request], options: Options, done: Callable[[int], object]
    ) -> npt.NDArray[Any]:
        rows = Rows(requests, "embeddings", options.edge(self._ranges(options)))
        with closing(self._answers(requests)) as answers:
            for index, answer in answers:
                rows.put(index, answer)
                done(len(requests[index]))
        if requests:
            return rows.gathered()
        width = partial(self._transport.width, self._settings.model)
        return rows.gathered(self._retried(width, time.sleep))

    def _answers(self, requests: list[Request]) -> Generator[tuple[int, Answer], None, None]:
        transport = self._transport
        calls = (partial(transport.infer, request) for request in requests)
        if len(requests) == 1:  # in this thread: no hop for a single request
            yield 0, self._retried(next(calls), time.sleep)
        else:
            tasks = (partial(self._retried, call) for call in calls)
            yield from transport.run(tasks, self._settings.concurrency)

    def _retried(self, call: Callable[[float], T], pause: Pause) -> T:
        attempts = self._settings.attempts()
        while True:
            try:
                return call(attempts.remaining_s())
            except ModelNotFound as error:
                raise self._settings.told(error) from error
            except Unavailable as error:
                delay = attempts.delay_after(error)
            pause(delay)
