# SPDX-License-Identifier: Apache-2.0
"""What both dialects ask for, and how it is given: texts, or token ids, and `Options`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, NamedTuple, TypeGuard

import numpy as np
import numpy.typing as npt

from arrowhead_client import (
    ArrowheadError,
    AsyncClient,
    InvalidInput,
    ModelInfo,
    Options,
    Token,
)
from arrowhead_client._options import check_lengths, longest_end
from arrowhead_server.gateway.embedder import Embedded, Embedder

MOST_TEXTS = 2048  # in a request, as OpenAI has it; Triton is asked in parts
_INFO_S = 2.0  # for so long a model is what it said it is


class TooManyTexts(InvalidInput):
    """More texts than a request may hold."""


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


@dataclass
class Asking:
    """The model as both dialects ask it."""

    client: AsyncClient
    embedder: Embedder
    most_texts: int = MOST_TEXTS
    _info: tuple[float, ModelInfo] | None = field(default=None, init=False)

    def check_name(self, name: str) -> None:
        """Refuses to be taken for another model; raises UnknownModel."""
        if name != self.client.model:
            raise UnknownModel(f"no model {name!r} here; wanted {self.client.model!r}")

    async def info(self) -> ModelInfo:
        """What the model says of itself, now or a moment ago."""
        now = time.monotonic()
        if self._info is None or now > self._info[0] + _INFO_S:
            self._info = now, await self.client.info()
        return self._info[1]

    async def embed(self, inputs: Sequence[str] | Sequence[list[int]], options: Options) -> Answer:
        """The vectors of texts, or of token ids, and what else there is to say of each.

        Raises:
            InvalidInput: a wish or text that cannot be fulfilled; says which.
            ServerError: Triton's fault.
        """
        if not inputs:
            raise InvalidInput("no texts: wanted one at least")
        if len(inputs) > self.most_texts:
            raise TooManyTexts(f"{len(inputs)} texts: wanted {self.most_texts} at most a request")
        if _are_texts(inputs):
            embedded = await self._embed(inputs, options)
            vectors = np.stack([one.vector for one in embedded])
        else:
            if options.needs_prompts:
                raise InvalidInput("token ids have no prompt in front: send texts, or no prompt")
            vectors = await self.client.embed_ids(inputs)  # type: ignore[arg-type]
            await self._check_ids(inputs)  # type: ignore[arg-type]
            embedded = [Embedded(vectors[0], len(ids), truncated=False) for ids in inputs]
        edge = options.edge((await self.info()).ranges if options.needs_ranges else None)
        tokens = [one.tokens for one in embedded]
        return Answer(edge(vectors), tokens, [one.truncated for one in embedded])

    async def prefix(self, options: Options) -> str:
        """What the options put in front of each text."""
        known = (await self.info()).prompts if options.needs_prompts else {}
        return options.prefix(known, self.client.model) or ""

    async def _embed(self, texts: Sequence[str], options: Options) -> list[Embedded]:
        for number, text in enumerate(texts):
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise InvalidInput(f"text {number} has no UTF-8: {error.reason}") from error
        prefix = await self.prefix(options)
        embedded = await self.embedder([prefix + text for text in texts])
        if options.truncate == "none":
            check_lengths([one.tokens for one in embedded], [one.truncated for one in embedded])
        if options.truncate == "start":
            ends = {
                place: prefix + await self._end(texts[place], prefix, one.tokens)
                for place, one in enumerate(embedded)
                if one.truncated
            }
            for place, one in zip(ends, await self.embedder(list(ends.values())), strict=True):
                embedded[place] = Embedded(one.vector, one.tokens, truncated=True)
        return embedded

    async def _check_ids(self, inputs: Sequence[list[int]]) -> None:
        """Another tokenizer's ids would give vectors that only look right; their ends tell."""
        (one,) = await self.client.tokenize(["a"])
        first = [token.id for token in takewhile(_is_special, one.tokens)]
        last = [token.id for token in takewhile(_is_special, reversed(one.tokens))][::-1]
        for number, ids in enumerate(inputs):
            if ids[: len(first)] != first or ids[len(ids) - len(last) :] != last:
                raise InvalidInput(
                    f"text {number}: token ids from {ids[:1]} to {ids[-1:]}; the model's own "
                    f"tokenizer gives {first} first and {last} last. Send texts in their place: in "
                    "LangChain, OpenAIEmbeddings(check_embedding_ctx_length=False)"
                )

    async def _end(self, text: str, prefix: str, limit: int) -> str:
        search = longest_end(text, limit)
        try:
            candidates = next(search)
            while True:
                counts = await self.client.count_tokens(candidates, prompt=prefix)
                candidates = search.send(counts.truncated.tolist())
        except StopIteration as found:
            end: str = found.value
            return end


def _is_special(token: Token) -> bool:
    return token.special


def _are_texts(inputs: Sequence[str] | Sequence[list[int]]) -> TypeGuard[Sequence[str]]:
    return isinstance(inputs[0], str)
