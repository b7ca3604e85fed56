# SPDX-License-Identifier: Apache-2.0
"""Texts through the tokenizer, and arrays through the encoder down to the kernels.

Faults are not crashes only: a vector that depends on its neighbours, or is not what torch computes
of the same weights, is one as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import tokenizers
from hypothesis import strategies as st

from arrowhead_engine.encoder import Encoder, cosine
from arrowhead_engine.errors import InvalidInput
from arrowhead_engine.tokenizer import MOST_CHARS_PER_TOKEN, Tokenizer
from perf.fuzz.target import Check, Target

_LEAST = 0.9999  # cosine of the same row by another engine in float32

# Texts

_PIECES = (
    *(
        "a",
        "word ",
        " ",
        "\t",
        "\n",
        "\x00",
        "\u0301",
        "e\u0301",
        "\u200d",
        "\ufeff",
        "\u202e",
        "汉",
    ),
    *(
        "🙂",
        "👩\u200d👧",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "[PAD]",
        "[UNK]",
        "##",
        "ß",
        "İ",
        "ﬁ",
        "한",
        "\u0627",
    ),
    *("x" * 99, "x" * 101, "-", "'", "\ufffd", "\U0010ffff", "\u2028", "¼", "1e9", "[MAS", "K]"),
)
_PIECE = st.one_of(st.sampled_from(_PIECES), st.text(max_size=6))
# A piece comes once, or so often that the text is longer than the model reads, or than is read.
_TIMES = st.one_of(st.just(1), st.integers(2, 40), st.sampled_from([300, 2_100, 17_000]))
_TEXT = st.lists(st.tuples(_PIECE, _TIMES), max_size=5).map(
    lambda parts: "".join(piece * times for piece, times in parts)[:40_000]
)
_TEXTS = st.lists(_TEXT, min_size=1, max_size=4)


@contextmanager
def _tokenizer(repository: Path) -> Iterator[Check]:
    folder = repository / "minilm_tokenizer" / "1"
    ours = Tokenizer.open(folder)
    plain = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    plain.no_padding()
    plain.no_truncation()

    def check(texts: list[str]) -> None:
        try:
            raw = [text.encode() for text in texts]
        except UnicodeEncodeError:  # half a surrogate pair: no UTF-8, so it cannot be sent
            return
        ids, truncated = ours.encode_bytes(raw)
        spans = ours.spans(texts, ids)
        most = MOST_CHARS_PER_TOKEN * ours.max_seq_length
        for row, text in enumerate(texts):
            assert ([ids[row]], [truncated[row]]) == ours.encode([text]), "company matters"
            whole = plain.encode(text[:most]).ids
            cut = len(whole) > ours.max_seq_length
            if cut:
                whole = [*whole[: ours.max_seq_length - 1], whole[-1]]
            assert ids[row] == whole, "not what the library gives of the whole text"
            assert truncated[row] == (cut or len(text) > most)
            own = spans.offsets[row, : len(ids[row])]
            assert (
                (own == -1).all(1) | ((own[:, 0] <= own[:, 1]) & (own[:, 1] <= len(text)))
            ).all()
        padded = ours.pad(ids, truncated)
        assert padded.input_ids.shape == (len(texts), max(map(len, ids)))

    yield check


TOKENIZER = Target(
    "tokenizer",
    "The ids that the library gives of the whole text, whatever stands beside it.",
    _TEXTS,
    _tokenizer,
)


# Arrays


class Arrays(NamedTuple):
    """What a caller of the encoder may hand over: rows of ids, and how many of each are real.

    Attributes:
        rows: of any lengths; padded to the longest, or not (`ragged`).
        lengths: of each; None: the right ones.
        ids_kind, lengths_kind: numpy's types.
        flat: whether the lengths have one axis, as they may.
        layout: how the ids lie in memory: "C", "F", or every other column of a wider array.
    """

    rows: list[list[int]]
    lengths: list[int] | None
    ids_kind: str
    lengths_kind: str
    flat: bool
    layout: str


_ID = st.one_of(
    st.integers(0, 30_521),
    st.integers(0, 30_521),
    st.sampled_from([0, 101, 102, 30_521]),
)
_BAD_ID = st.one_of(_ID, st.sampled_from([-1, 30_522, 2**31 - 1, -(2**31)]))
_ROW = st.one_of(
    st.lists(_ID, min_size=1, max_size=12),
    st.tuples(_ID, st.sampled_from([30, 127, 255, 256, 257, 300])).map(
        lambda one: [one[0]] * one[1]
    ),
    st.lists(_BAD_ID, max_size=6),
)
_LENGTHS = st.lists(st.sampled_from([0, 1, 2, 12, 256, 257, -1, 2**31 - 1, -(2**31)]), max_size=5)
_ARRAYS = st.builds(
    Arrays,
    st.one_of(st.lists(_ROW, min_size=1, max_size=5), st.lists(_ROW, max_size=2)),
    st.one_of(st.none(), st.none(), _LENGTHS),
    st.sampled_from(["<i4"] * 4 + ["<i8", "<i2", "<u4", "<u8", "<f4", ">i4", "?", "O"]),
    st.sampled_from(["<i4"] * 4 + ["<i8", "<f8", "<u4", "?", "O"]),
    st.booleans(),
    st.sampled_from(["C", "C", "F", "half"]),
)


@contextmanager
def _encoder(repository: Path) -> Iterator[Check]:
    import torch

    torch.set_num_threads(1)  # rows are short; of several threads, the others would only wait
    weights = repository / "minilm_encoder" / "1" / "weights.parquet"
    ours = Encoder.open(weights, dtype="float32")
    peer = Encoder.open(weights, dtype="float32", engine="torch", device="cpu")

    def check(arrays: Arrays) -> None:
        ids, lengths = _arrays(arrays)
        try:
            rows = ours.check(ids, lengths)
        except InvalidInput as error:
            assert 0 < len(str(error)) <= 1000
            return
        met = ours.embed(rows)
        assert met.shape == (len(ids), ours.spec.dimension)
        assert met.dtype == np.float32
        assert np.isfinite(met).all()
        for row, vector in zip(rows, met, strict=True):
            own = np.array(row.tolist(), np.int32)
            assert (ours.embed([own])[0] == vector).all(), "company matters"
            least = cosine(peer.embed([own])[0], vector)
            assert least >= _LEAST, f"cosine {least:.6f} with torch"

    yield check


def _arrays(arrays: Arrays) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """The arrays, as a caller would have made them."""
    width = max(map(len, arrays.rows), default=0)
    ids = np.zeros((len(arrays.rows), width), np.int64)
    for place, row in zip(ids, arrays.rows, strict=True):
        place[: len(row)] = row
    lengths = np.array(
        [len(row) for row in arrays.rows] if arrays.lengths is None else arrays.lengths
    )
    with np.errstate(invalid="ignore"):
        cast = ids.astype(arrays.ids_kind)
        told = lengths.astype(arrays.lengths_kind)
    if arrays.layout == "F":
        cast = np.asfortranarray(cast)
    if arrays.layout == "half":
        cast = np.repeat(cast, 2, axis=1)[:, ::2]
    return cast, told if arrays.flat else told[:, None]


ENCODER = Target(
    "encoder",
    "Refused, or to the bit the vector of each row alone, which is torch's of the same weights.",
    _ARRAYS,
    _encoder,
    found=(
        # Twice the same row of wide ids: read as int32 it was twice as long, past all tables.
        Arrays([[101, 2204, 102]] * 2, None, "<i8", "<i4", False, "C"),
        Arrays([[101] * 256] * 2, None, "<i8", "<i8", True, "C"),
        Arrays([[101, 102]], None, "<i4", "<f8", False, "C"),
    ),
)
