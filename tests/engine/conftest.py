# SPDX-License-Identifier: Apache-2.0
"""MiniLM beside the library it comes from, and texts on which the two might differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from arrowhead_engine.tokenizer import Tokenizer

HOSTILE = [
    "",
    " ",
    "a",
    "hello world",
    "The quick brown fox jumps over the lazy dog.",
    "   leading, trailing and   inner   blanks \t\n ",
    "UPPER lower MiXeD",
    "naïve café, Straße, Ångström, e\u0301 combining",
    "快速的棕色狐狸跳过懒狗。",
    "素早い茶色の狐 한국어 텍스트 Быстрая лиса الثعلب",
    "🙂🚀👩\u200d👩\u200d👧 zero\u200bwidth \ufeffbom \u202eright to left",
    "[CLS] literal [SEP] special [MASK] tokens [PAD][UNK]",
    "control \x00\x01\x7f characters \ufffd",
    "x" * 99 + " " + "x" * 100 + " " + "x" * 101,
    "word " * 300,
    "a b c d e f g " * 20,
    "no-spaces-but-punctuation." * 60,
    "汉" * 400,
    "3.14159 2,718 1e-9 0xFF $5.00 50% #tag @name",
]
LENGTHS = [f"number {i} " * (i % 30 + 1) for i in range(40)]


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return HOSTILE + LENGTHS


@pytest.fixture(scope="session")
def tokenizer(minilm_repository: Path) -> Tokenizer:
    return Tokenizer.open(minilm_repository / "minilm_tokenizer" / "1")


@pytest.fixture(scope="session")
def sentence_transformer(minilm_source: Path) -> Any:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(minilm_source), device="cpu")


@pytest.fixture(scope="session")
def reference(sentence_transformer: Any, texts: list[str]) -> npt.NDArray[np.float32]:
    """sentence-transformers' float32 vectors, each text alone."""
    vectors: npt.NDArray[np.float32] = sentence_transformer.encode(texts, batch_size=1)
    return vectors
