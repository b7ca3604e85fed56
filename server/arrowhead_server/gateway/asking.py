# SPDX-License-Identifier: Apache-2.0
"""What may be asked for besides texts, whatever the dialect, and how it is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from arrowhead_client import AsyncClient, InvalidInput, normalize, truncate_dimensions
from arrowhead_server.gateway.embedder import Embedded, Embedder

MOST_TEXTS = 2048  # in a request, as OpenAI has it; Triton is asked in parts


class TextTooLong(InvalidInput):
    """A text has more tokens than the model reads, and the caller did not ask to cut it."""


class TooManyTexts(InvalidInput):
    """More texts than a request may hold."""


@dataclass(frozen=True)
class Wish:
    """What a caller wants of each text.

    Attributes:
        prompt_name: one of the model's prompts to put before it.
        cut: whether a text that is too long is cut at its end; else it is an error.
        unit_length: whether vectors are scaled to length 1, whatever the model does.
        dimensions: how many components to keep, then scaled to length 1 again; None: all.
    """

    prompt_name: str | None = None
    cut: bool = False
    unit_length: bool = False
    dimensions: int | None = None


@dataclass(frozen=True)
class Asking:
    """The model as both dialects ask it."""

    client: AsyncClient
    embedder: Embedder
    most_texts: int = MOST_TEXTS

    async def embed(
        self, texts: Sequence[str], wish: Wish
    ) -> tuple[npt.NDArray[np.float32], list[Embedded]]:
        """Vectors float32 [N, D], and what else there is to say of each text.

        Raises:
            InvalidInput: a wish or text that cannot be fulfilled; says which.
            ServerError: Triton's fault.
        """
        if not texts:
            raise InvalidInput("no texts: wanted one at least")
        if len(texts) > self.most_texts:
            raise TooManyTexts(f"{len(texts)} texts: wanted {self.most_texts} at most a request")
        for number, text in enumerate(texts):
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise InvalidInput(f"text {number} has no UTF-8: {error.reason}") from error
        prompt = await self._prompt(wish.prompt_name)
        embedded = await self.embedder([prompt + text for text in texts])
        if not wish.cut:
            self._check_lengths(embedded)
        vectors = np.stack([one.vector for one in embedded])
        if wish.dimensions is not None:
            vectors = truncate_dimensions(vectors, wish.dimensions)
        elif wish.unit_length:
            vectors = normalize(vectors)
        return vectors, embedded

    async def _prompt(self, name: str | None) -> str:
        if name is None:
            return ""
        prompts = await self.client.prompts()
        if name not in prompts:
            known = ", ".join(sorted(prompts)) or "none"
            raise InvalidInput(f"the model has no prompt {name!r}; it has: {known}")
        return prompts[name]

    def _check_lengths(self, embedded: Sequence[Embedded]) -> None:
        for number, one in enumerate(embedded):
            if one.truncated:
                raise TextTooLong(
                    f"text {number} has more than the {one.tokens} tokens that the model reads; "
                    "shorten it, or ask to have it cut"
                )
