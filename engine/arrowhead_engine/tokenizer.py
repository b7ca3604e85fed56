# SPDX-License-Identifier: Apache-2.0
"""Text to token ids, with HuggingFace's Rust `tokenizers`. Imports no torch."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import tokenizers

from arrowhead_engine.errors import CertificateMismatch, InvalidInput, UnsupportedModel
from arrowhead_engine.spec import Certificate, ModelSpec, model_sha256, read_metadata

# A text is read only as far as its tokens are used: 10 MB would otherwise hold the tokenizer for
# seconds, though all but the first few hundred tokens are thrown away. In English a token is 4-5
# characters, so 8 a token suffice for nearly every text; what is denser in characters (runs of
# blanks, words without end) is read to 64 a token and no further.
FIRST_CHARS_PER_TOKEN = 8
MOST_CHARS_PER_TOKEN = 64


class Tokens(NamedTuple):
    """The ids of some texts, padded to the longest of them.

    Attributes:
        input_ids: int32 [B, S], rows padded at the end with the model's pad id.
        length: int32 [B, 1], real tokens in each row, special tokens included.
        truncated: bool [B, 1], whether the text was longer than the model's limit and lost its end.
    """

    input_ids: npt.NDArray[np.int32]
    length: npt.NDArray[np.int32]
    truncated: npt.NDArray[np.bool_]


class Spans(NamedTuple):
    """What each token of some texts stands for, padded like `Tokens`.

    Attributes:
        tokens: object [B, S], each token's own name in UTF-8.
        offsets: int32 [B, S, 2], its first character in the text and the one after its last; -1 and
            -1 of what is not of the caller's text: special tokens, a default prompt, padding.
    """

    tokens: npt.NDArray[np.object_]
    offsets: npt.NDArray[np.int32]


class Tokenizer:
    """A model's tokenizer, cutting texts at the model's limit. Safe to share between threads."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, spec: ModelSpec) -> None:
        tokenizer.no_padding()
        tokenizer.enable_truncation(spec.max_seq_length)
        self._tokenizer = tokenizer
        self._pad_id = spec.config.get("pad_token_id")
        if type(self._pad_id) is not int or not 0 <= self._pad_id < 2**31:
            raise UnsupportedModel(f"pad_token_id is {self._pad_id!r}; wanted a token id")
        self._default_prompt = spec.default_prompt
        self._prompts = tuple(prompt for prompt in spec.prompts.values() if prompt)
        added = tokenizer.get_added_tokens_decoder().values()
        self._longest_special = max((len(token.content) for token in added), default=0)
        self.max_seq_length = spec.max_seq_length

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Tokenizer:
        """Reads `tokenizer.json` and `metadata.json` of a converted model.

        Raises:
            FileNotFoundError: one of the two is missing.
            UnsupportedModel: `tokenizers` cannot read the one, or this Arrowhead the other.
            CertificateMismatch: it is not the tokenizer that was certified.
        """
        path = Path(folder) / "tokenizer.json"
        metadata = read_metadata(Path(folder) / "metadata.json")
        return cls.certified(path.read_bytes(), metadata, str(path))

    @classmethod
    def certified(cls, raw: bytes, metadata: Mapping[str, str], path: str) -> Tokenizer:
        """The tokenizer in the bytes of a `tokenizer.json`, if it is what the metadata certify.

        Args:
            raw: the file.
            metadata: of the model, as `read_metadata` gives them.
            path: where the file came from, for errors.

        Raises:
            UnsupportedModel, CertificateMismatch: as `open`.
        """
        spec, certificate = ModelSpec.from_metadata(metadata), Certificate.from_metadata(metadata)
        if hashlib.sha256(raw).hexdigest() != certificate.tokenizer_sha256:
            raise CertificateMismatch(
                f"{path}: not the certified tokenizer; convert the model again"
            )
        if model_sha256(metadata) != certificate.model_sha256:
            raise CertificateMismatch(f"{path}: not the certified limits; convert the model again")
        return cls.parse(raw, spec)

    @classmethod
    def parse(cls, raw: bytes, spec: ModelSpec) -> Tokenizer:
        """The tokenizer in the bytes of a `tokenizer.json`.

        Raises:
            UnsupportedModel: `tokenizers` cannot read it.
        """
        try:
            tokenizer = tokenizers.Tokenizer.from_buffer(raw)
        except Exception as error:  # tokenizers raises nothing more telling
            raise UnsupportedModel(f"tokenizer.json: {error}") from error
        return cls(tokenizer, spec)

    @cached_property
    def highest_id(self) -> int:
        """The highest id the tokenizer can give, added tokens included."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values())

    @cached_property
    def ends(self) -> tuple[list[int], list[int]]:
        """The ids that stand before those of every text, and those behind: [101], [102] of BERT."""
        encoding = self._tokenizer.encode("a")
        own = [place for place, mask in enumerate(encoding.special_tokens_mask) if not mask]
        return encoding.ids[: own[0]], encoding.ids[own[-1] + 1 :]

    def __call__(self, texts: Sequence[str]) -> Tokens:
        """Tokenizes the texts, each as if it were alone."""
        return self.pad(*self.encode(texts))

    def pad(self, ids: Sequence[Sequence[int]], truncated: Sequence[bool]) -> Tokens:
        """What `encode` gave for some texts, as arrays."""
        length = np.array([len(row) for row in ids], np.int32)
        input_ids = np.full((len(ids), int(length.max(initial=0))), self._pad_id, np.int32)
        for row, values in zip(input_ids, ids, strict=True):
            row[: len(values)] = values
        return Tokens(input_ids, length[:, None], np.array(truncated, np.bool_)[:, None])

    def encode(self, texts: Sequence[str]) -> tuple[list[list[int]], list[bool]]:
        """The ids of each text without padding, and whether it was truncated."""
        if self._default_prompt:
            texts = [self._prompted(text) for text in texts]
        enough = FIRST_CHARS_PER_TOKEN * self.max_seq_length
        # One Rust call for all texts of ordinary length.
        short = iter(
            self._tokenizer.encode_batch_fast([text for text in texts if len(text) <= enough])
        )
        ids, truncated = [], []
        for text in texts:
            if len(text) <= enough:
                encoding = next(short)
                ids.append(encoding.ids)
                truncated.append(bool(encoding.overflowing))
            else:
                row, cut = self._encode_long(text)
                ids.append(row)
                truncated.append(cut)
        return ids, truncated

    def spans(self, texts: Sequence[str], ids: Sequence[Sequence[int]]) -> Spans:
        """What the tokens that `encode` gave for these texts stand for."""
        longest = max(map(len, ids), default=0)
        tokens = np.full((len(ids), longest), b"", np.object_)
        offsets = np.full((len(ids), longest, 2), -1, np.int32)
        most = MOST_CHARS_PER_TOKEN * self.max_seq_length
        for row, text in enumerate(texts):
            prompted = self._prompted(text) if self._default_prompt else text
            ahead = len(prompted) - len(text)
            encoding = self._tokenizer.encode(prompted[:most])
            for place, (token, (start, stop), special) in enumerate(
                zip(encoding.tokens, encoding.offsets, encoding.special_tokens_mask, strict=True)
            ):
                tokens[row, place] = token.encode()
                if not special and start >= ahead:
                    offsets[row, place] = start - ahead, stop - ahead
        return Spans(tokens, offsets)

    def encode_bytes(self, values: Iterable[bytes]) -> tuple[list[list[int]], list[bool]]:
        """The same of texts in UTF-8.

        Raises:
            InvalidInput: names the first that is not.
        """
        return self.encode(utf8(values))

    def _prompted(self, text: str) -> str:
        """The text behind the model's default prompt, unless the caller chose a prompt of its."""
        return text if text.startswith(self._prompts) else self._default_prompt + text

    def _encode_long(self, text: str) -> tuple[list[int], bool]:
        """The first `max_seq_length` ids of a long text, from no more of it than that takes."""
        for chars_per_token in (FIRST_CHARS_PER_TOKEN, MOST_CHARS_PER_TOKEN):
            limit = chars_per_token * self.max_seq_length
            encoding = self._tokenizer.encode(text[:limit])
            # The cut may have split a word or a special token like [MASK]. If a later word than the
            # last kept one was seen, and no special token reaches from the cut to the kept ids,
            # the split lies behind the ids that count, and they are those of the whole text.
            if (
                encoding.overflowing
                and _last_word(encoding.overflowing[-1]) > _last_word(encoding)
                and _last_character(encoding) + self._longest_special <= limit
            ):
                break
        return encoding.ids, bool(encoding.overflowing) or len(text) > limit


def _last_character(encoding: tokenizers.Encoding) -> int:
    return max((end for _, end in encoding.offsets), default=0)


def _last_word(encoding: tokenizers.Encoding) -> int:
    return max((word for word in encoding.word_ids if word is not None), default=-1)


def utf8(values: Iterable[bytes]) -> list[str]:
    """The texts whose UTF-8 these are.

    Raises:
        InvalidInput: names the first value that is not UTF-8, and where.
    """
    texts = []
    for i, value in enumerate(values):
        try:
            texts.append(value.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise InvalidInput(
                f"text {i} is not UTF-8: byte {error.start} of {len(value)} is "
                f"0x{value[error.start]:02x}"
            ) from None
    return texts
