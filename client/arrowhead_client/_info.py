# SPDX-License-Identifier: Apache-2.0
"""`ModelInfo`: what a served model says of itself.

Its tokenizer tells it (output `info`), so it is of the very version that answers; the prompts come
from the ensemble's configuration, where their owner may have written more.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from arrowhead_client._algebra import Vectors
from arrowhead_client._errors import UnexpectedResponse


class Config(NamedTuple):
    """What the configuration of a served model says.

    Attributes:
        prompts: by name.
        parts: what its tokenizer and encoder are called, without their endings; empty if it has
            none.
        version: theirs; 0 if it has none.
    """

    prompts: dict[str, str]
    parts: str = ""
    version: int = 0


class ModelFiles(NamedTuple):
    """What to tokenize texts for a served model with, as its owner has it.

    Attributes:
        tokenizer: `tokenizer.json`, for `tokenizers.Tokenizer.from_buffer`.
        metadata: `metadata.json`: limits, prompts and certificate.
    """

    tokenizer: bytes
    metadata: bytes

    @classmethod
    def told(cls, name: str, answer: Mapping[str, Any]) -> ModelFiles:
        """The files in the answer of a model's tokenizer.

        Raises:
            UnexpectedResponse: they are not there.
        """
        try:
            return cls(*(bytes(answer[file][0, 0]) for file in cls._fields))
        except (LookupError, TypeError) as error:
            raise UnexpectedResponse(
                f"the tokenizer of {name!r} gave no files ({error}); was it converted by another "
                "version of Arrowhead?"
            ) from error


@dataclass(frozen=True)
class ModelInfo:
    """A served model.

    Attributes:
        name: what it is asked as.
        version: the one that answers.
        parts: what its tokenizer and encoder are called, without their endings.
        dimension: D, the width of an embedding.
        max_seq_length: tokens read of a text, special ones included.
        fingerprint: names the space of its vectors, in 32 hexadecimal digits: a hash of weights,
            tokenizer and what else decides on a vector. Vectors of different spaces are not
            comparable.
        pooling: how token vectors become one, such as "mean".
        normalize: whether its vectors have length 1.
        prompts: those it was trained with, by name.
        certificate: how its conversion was proved: `worst_cosine`, `mean_cosine`, `texts`, hashes
            and versions.
        source: where it was converted from.
        ranges: float32 [2, D], the ends of each component's range, for `quantize`; None of a model
            converted before there were any.
    """

    name: str
    version: int
    parts: str
    dimension: int
    max_seq_length: int
    fingerprint: str
    pooling: str = "mean"
    normalize: bool = False
    prompts: Mapping[str, str] = field(default_factory=dict)
    certificate: Mapping[str, Any] = field(default_factory=dict)
    source: Mapping[str, str] = field(default_factory=dict)
    ranges: Vectors | None = None

    @classmethod
    def told(cls, name: str, config: Config, answer: Mapping[str, Any]) -> ModelInfo:
        """The model of that configuration, whose tokenizer answered so.

        Raises:
            UnexpectedResponse: it is not what this version's tokenizers give.
        """
        try:
            said = json.loads(answer["info"][0, 0])
            ranges = said.pop("ranges")
            told = cls(
                name=name,
                version=config.version,
                parts=config.parts,
                prompts=config.prompts,
                ranges=None if ranges is None else _array(ranges),
                **said,
            )
            told._check()
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise UnexpectedResponse(
                f"the tokenizer of {name!r} told something else than what it is ({error}); was it "
                "converted by another version of Arrowhead?"
            ) from error
        return told

    def _check(self) -> None:
        """Refuses what JSON may hold and these attributes may not, with a ValueError."""
        for name, kind in _KINDS.items():
            if type(value := getattr(self, name)) is not kind:
                raise ValueError(f"{name} is {value!r:.80}, wanted {kind.__name__}")
        for name in ("dimension", "max_seq_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}")
        if self.ranges is not None and (
            self.ranges.shape != (2, self.dimension) or not np.isfinite(self.ranges).all()
        ):
            raise ValueError(f"ranges of {self.ranges.shape}, wanted (2, {self.dimension}), finite")


_KINDS = {
    "dimension": int,
    "max_seq_length": int,
    "fingerprint": str,
    "pooling": str,
    "normalize": bool,
    "certificate": dict,
    "source": dict,
}


def _array(raw: str) -> Vectors:
    return np.frombuffer(base64.b64decode(raw), "<f4").reshape(2, -1)
