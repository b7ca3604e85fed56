# SPDX-License-Identifier: Apache-2.0
"""What both dialects ask for, and how it is given: texts, or token ids, and `Options`."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, TypeGuard

import numpy as np
import numpy.typing as npt

from arrowhead_client import (
    ArrowheadError,
    AsyncClient,
    InvalidInput,
    InvalidRequest,
    ModelFiles,
    ModelInfo,
    ModelNotFound,
    ModelNotReady,
    Options,
    Unavailable,
    UnexpectedResponse,
)
from arrowhead_client._options import check_lengths, longest_end
from arrowhead_engine.errors import EngineError
from arrowhead_engine.spec import parse_metadata
from arrowhead_engine.tokenizer import Tokenizer
from arrowhead_server.gateway.call import CALL
from arrowhead_server.gateway.embedder import ENTRIES, Counts, Embedded, Embedder
from arrowhead_server.gateway.spans import Spans

MOST_CHARACTERS = 100_000  # of a text; a model reads 64 for each token of its limit at the most
MOST_TEXTS = 2048  # in a request, as OpenAI has it; Triton is asked in parts
_LOG = logging.getLogger(__name__)
WATCH_S = 1.0  # for so long after another version went live the one before is asked
# Replicas behind a balancer turn to another version one by one.
TURN_S = 5.0  # so long a request looks for one that has the version it wants, or for the other
_TURN_STEP_S = 0.1
_LOOKS = 3  # in a row: what is live, and what that says of itself, are asked of different ones
_KEPT_S = 60.0  # so long the version before is remembered


class TooManyTexts(InvalidInput):
    """More texts than a request may hold."""


class TextTooLarge(InvalidInput):
    """A text that no model reads to its end, whatever its words."""


class UnknownModel(ArrowheadError):
    """The caller named a model that is not this gateway's."""


class Answer(NamedTuple):
    """What came of a request's N texts.

    Attributes:
        vectors: [N, D], as the options have them.
        tokens: of each text, how many the model read.
        truncated: of each text, whether it has more.
    """

    vectors: npt.NDArray[Any]
    tokens: list[int]
    truncated: list[bool]


class Asking:
    """The model as both dialects ask it: always one version of it for all texts of a request.

    Args:
        client: asks Triton; stays its owner's.
        entries: texts remembered.
        most_texts: in a request.
        most_characters: of a text.
        spans: makes those of its work.
        asked: told how each request to Triton ended, and the seconds that it took.

    Attributes:
        client, most_texts: as given.
        counts: of texts, since the start.
        swaps: how often another version took over.
    """

    def __init__(
        self,
        client: AsyncClient,
        entries: int = ENTRIES,
        most_texts: int = MOST_TEXTS,
        most_characters: int = MOST_CHARACTERS,
        spans: Spans | None = None,
        asked: Callable[[str, float], object] = lambda outcome, seconds: None,
    ) -> None:
        self.client = client
        self._spans = spans or Spans()
        self._asked = asked
        self.swaps = 0
        self.most_texts = most_texts
        self._most_characters = most_characters
        self.counts = Counts()
        self._entries = entries
        self._live: Embedder | None = None
        self._before: Embedder | None = None
        self._swapped = 0.0
        self._looking: asyncio.Task[Embedder] | None = None

    @property
    def remembered(self) -> int:
        """How many texts are."""
        return 0 if self._live is None else len(self._live)

    @property
    def live(self) -> ModelInfo | None:
        """The version that is asked now; None until one was found."""
        return None if self._live is None else self._live.info

    @property
    def waiting(self) -> dict[str, int]:
        """How many texts wait for their turn at Triton, by lane."""
        return {"interactive": 0, "bulk": 0} if self._live is None else self._live.waiting

    async def ready(self) -> bool:
        """Whether Triton says that it is, and the model's tokenizer is here."""
        try:
            await self._served()
            return await self.client.ready()
        except ArrowheadError:
            return False

    async def watch(self) -> None:
        """Looks for another version for as long as it runs."""
        while True:
            try:
                await self._look()
            except ArrowheadError:
                pass  # those who ask are told
            except Exception:  # noqa: BLE001 (whatever it is, the next version is looked for)
                _LOG.exception("the look for another version failed")
            if time.monotonic() - self._swapped > _KEPT_S:
                self._before = None
            await asyncio.sleep(WATCH_S)

    def check_name(self, name: str) -> None:
        """Refuses to be taken for another model; raises UnknownModel."""
        if name != self.client.model:
            raise UnknownModel(f"no model {name!r} here; wanted {self.client.model!r}")

    async def info(self) -> ModelInfo:
        """What the model says of itself, now or a moment ago."""
        return (await self._served()).info

    async def embed(self, inputs: Sequence[str] | Sequence[list[int]], options: Options) -> Answer:
        """The vectors of texts, or of token ids, and what else there is to say of each.

        Raises:
            InvalidInput: a wish or text that cannot be fulfilled; says which.
            ServerError: Triton's fault.
        """
        return await self.embed_all((inputs, options))

    async def embed_all(
        self, *sides: tuple[Sequence[str] | Sequence[list[int]], Options]
    ) -> Answer:
        """As `embed`, of several lists one behind the other, each with options of its own."""
        if not all(inputs for inputs, _ in sides):
            raise InvalidInput("no texts: wanted one at least")
        self.check([one for inputs, _ in sides for one in inputs])  # type: ignore[arg-type]
        answer = await self._embed_all(*sides)
        self.counts.tokens += (tokens := sum(answer.tokens))
        self.counts.truncated += sum(answer.truncated)
        if (call := CALL.get()) is not None:
            call.texts, call.tokens = len(answer.tokens), tokens
        return answer

    async def _embed_all(
        self, *sides: tuple[Sequence[str] | Sequence[list[int]], Options]
    ) -> Answer:
        served, end = await self._served(), 0.0
        while True:
            try:
                return await _embed_all(served, sides)
            except (ModelNotFound, Unavailable) as error:
                end = end or time.monotonic() + TURN_S
                another = await self._another(served)
                if another is served:
                    # The server is there, and this version is on another replica, or will be here.
                    if not isinstance(error, ModelNotFound | ModelNotReady):
                        raise
                    await asyncio.sleep(_TURN_STEP_S)
                    another = self._before or served
                if time.monotonic() > end:
                    raise
                served = another

    async def _another(self, served: Embedder) -> Embedder:
        """What is live, after this version was not found: another may be live since."""
        try:
            live = await self._look()  # it may have begun before that
            return live if live is not served else await self._look()
        except ModelNotReady:
            return served

    def check(self, inputs: Sequence[str] | Sequence[list[int]]) -> None:
        """That a request holds no more than it may.

        Raises:
            TooManyTexts: too many texts.
            TextTooLarge: too many characters of one.
        """
        if len(inputs) > self.most_texts:
            raise TooManyTexts(f"{len(inputs)} texts: wanted {self.most_texts} at most a request")
        most = self._most_characters
        for number, text in enumerate(inputs):
            if isinstance(text, str) and len(text) > most:
                raise TextTooLarge(
                    f"text {number} has {len(text)} characters: wanted {most} at most; cut it, or "
                    "send it in parts"
                )

    async def prefix(self, options: Options) -> str:
        """What the options put in front of each text."""
        return _prefix(await self.info(), options)

    async def _served(self) -> Embedder:
        return self._live or await self._look()

    async def _look(self) -> Embedder:
        """What is live now. One look serves all who want one: none queues behind a dead server."""
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._looked_for())
            self._looking.add_done_callback(lambda done: done.cancelled() or done.exception())
        return await asyncio.shield(self._looking)

    async def _looked_for(self) -> Embedder:
        for _ in range(_LOOKS - 1):
            with suppress(ModelNotFound):
                return await self._looked()
        return await self._looked()

    async def _looked(self) -> Embedder:
        live = self._live
        try:
            info = await self.client.info()
            if live is None or _space(live.info) != _space(info):
                live = self._before
            if live is None or _space(live.info) != _space(info):
                live = await self._opened(info)
        except InvalidRequest as error:  # not what a caller of the gateway sent
            raise UnexpectedResponse(
                f"the served model does not tell what it is: convert it again. {error}",
                status=error.status,
            ) from error
        if self._live is not None and live is not self._live:
            self.swaps += 1
            self._before, self._swapped = self._live, time.monotonic()
        live.info = info  # its prompts may be others
        self._live = live
        return live

    async def _opened(self, info: ModelInfo) -> Embedder:
        tokenizer = await asyncio.to_thread(_tokenizer, await self.client.files(info))
        return Embedder(
            self.client,
            info,
            tokenizer,
            self.counts,
            self._entries,
            spans=self._spans,
            asked=self._asked,
        )


def _space(info: ModelInfo) -> tuple[int, str]:
    return info.version, info.fingerprint


def _tokenizer(files: ModelFiles) -> Tokenizer:
    try:
        metadata = parse_metadata(files.metadata, "the served metadata.json")
        tokenizer = Tokenizer.certified(files.tokenizer, metadata, "the served tokenizer.json")
    except EngineError as error:
        raise UnexpectedResponse(f"{error}; is the server of another Arrowhead?") from error
    tokenizer.highest_id  # noqa: B018 (0.1 s and more of a large vocabulary; remembered)
    return tokenizer


def _prefix(info: ModelInfo, options: Options) -> str:
    return options.prefix(info.prompts, info.name) or ""


async def _embed_all(
    served: Embedder, sides: Sequence[tuple[Sequence[str] | Sequence[list[int]], Options]]
) -> Answer:
    answers = [await _embed(served, inputs, options) for inputs, options in sides]
    if len(answers) == 1:
        return answers[0]
    return Answer(
        np.concatenate([one.vectors for one in answers]),
        [tokens for one in answers for tokens in one.tokens],
        [truncated for one in answers for truncated in one.truncated],
    )


async def _embed(
    served: Embedder, inputs: Sequence[str] | Sequence[list[int]], options: Options
) -> Answer:
    if _are_texts(inputs):
        embedded = await _embed_texts(served, inputs, options)
    else:
        if options.needs_prompts:
            raise InvalidInput("token ids have no prompt in front: send texts, or no prompt")
        _check_ends(served.tokenizer, inputs)  # type: ignore[arg-type]
        embedded = await served([tuple(ids) for ids in inputs])  # type: ignore[arg-type]
    edge = options.edge(served.info.ranges if options.needs_ranges else None)
    vectors = np.stack([one.vector for one in embedded])
    tokens = [one.tokens for one in embedded]
    return Answer(edge(vectors), tokens, [one.truncated for one in embedded])


def _check_ends(tokenizer: Tokenizer, inputs: Sequence[list[int]]) -> None:
    """Another tokenizer's ids would give vectors that only look right; their ends tell."""
    first, last = tokenizer.ends
    for number, ids in enumerate(inputs):
        if ids and (ids[: len(first)] != first or ids[len(ids) - len(last) :] != last):
            raise InvalidInput(
                f"input {number} has token ids from {ids[0]} to {ids[-1]}: the model's own "
                f"tokenizer gives {first} first and {last} last. Send the text instead: in "
                "LangChain, OpenAIEmbeddings(check_embedding_ctx_length=False)"
            )


async def _embed_texts(served: Embedder, texts: Sequence[str], options: Options) -> list[Embedded]:
    for number, text in enumerate(texts):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidInput(f"text {number} has no UTF-8: {error.reason}") from error
    prefix = _prefix(served.info, options)
    embedded = await served([prefix + text for text in texts])
    if options.truncate == "none":
        check_lengths([one.tokens for one in embedded], [one.truncated for one in embedded])
    if options.truncate == "start":
        ends = {
            place: prefix + await asyncio.to_thread(_end, served, texts[place], prefix)
            for place, one in enumerate(embedded)
            if one.truncated
        }
        for place, one in zip(ends, await served(list(ends.values())), strict=True):
            embedded[place] = Embedded(one.vector, one.tokens, truncated=True)
    return embedded


def _end(served: Embedder, text: str, prefix: str) -> str:
    search = longest_end(text, served.info.max_seq_length)
    try:
        candidates = next(search)
        while True:
            _, truncated = served.tokenizer.encode([prefix + one for one in candidates])
            candidates = search.send(truncated)
    except StopIteration as found:
        end: str = found.value
        return end


def _are_texts(inputs: Sequence[str] | Sequence[list[int]]) -> TypeGuard[Sequence[str]]:
    return isinstance(inputs[0], str)
