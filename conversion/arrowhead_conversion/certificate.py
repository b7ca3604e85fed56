# SPDX-License-Identifier: Apache-2.0
"""The parity certificate: our float32 vectors beside sentence-transformers' own."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from arrowhead_conversion.errors import NotFaithful, UnsupportedSource
from arrowhead_engine.compute import choose
from arrowhead_engine.encoder import PROBE_COSINE, Encoder, cosine
from arrowhead_engine.spec import Certificate, ModelSpec, Probe
from arrowhead_engine.tokenizer import Tokenizer
from arrowhead_engine.weightfile import WeightFile

# What float16 storage costs is below 1e-6. No lower than what loading asks for, or a model would be
# converted that can never be served.
LEAST_COSINE = PROBE_COSINE[torch.float32]

# Texts in which tokenizers, limits and lengths differ: what users send, and what breaks things.
TEXTS = (
    "A man is playing a guitar on the street.",
    "The quick brown fox jumps over the lazy dog.",
    "How do I reset my password?",
    "Transformers map a sequence of tokens to a sequence of vectors of the same length.",
    "a",
    "",
    "   leading, trailing and   inner   blanks   ",
    "UPPER lower MiXeD",
    "naïve café, Straße, Ångström, São Paulo",
    "快速的棕色狐狸跳过懒狗。",
    "Быстрая коричневая лиса прыгает через ленивую собаку.",
    "素早い茶色の狐がのろまな犬を飛び越える。",
    "الثعلب البني السريع يقفز فوق الكلب الكسول",
    "emoji 🙂🚀 and symbols ∑ ∞ ≠ § ©",
    "def embed(texts: list[str]) -> np.ndarray:\n    return model.encode(texts)\n",
    '{"id": 17, "tags": ["a", "b"], "price": 12.50}',
    "https://example.org/path?query=1&other=two#fragment",
    "3.14159 2,718 1e-9 0xFF 2026-11-24T06:03:20Z",
    "antidisestablishmentarianism pneumonoultramicroscopicsilicovolcanoconiosis",
    "x" * 150,
    "one two three four five six seven eight nine ten " * 5,
    "The committee met on Tuesday to discuss the budget for the coming year. " * 12,
    "word " * 600,
    "A long text whose end is cut off, because it has more tokens than the model takes. " * 60,
)
LIBRARIES = ("arrowhead", "sentence-transformers", "transformers", "tokenizers", "torch")
PROBES = (0, 2, 10, 20)  # of TEXTS, compared again at every load: short, plain, foreign, longer


def certify(
    source: Path,
    weights: Path,
    tokenizer: bytes,
    spec: ModelSpec,
    progress: Callable[[int], object],
) -> Certificate:
    """Embeds `TEXTS` with the source library and with the engine, and compares.

    Args:
        source: the sentence-transformers folder.
        weights: the weight file made from it.
        tokenizer: the bytes of its `tokenizer.json`.
        spec: its spec.
        progress: called with 1 after each text.

    Raises:
        NotFaithful: names the text that is farthest off.
    """
    # Imported here: they take seconds, and nothing else of a conversion needs them.
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging

    logging.disable_progress_bar()

    try:
        reference = SentenceTransformer(str(source), device="cpu", local_files_only=True)
    except Exception as error:  # whatever a broken model makes it raise
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UnsupportedSource(
            f"{source}: sentence-transformers cannot load it: {reason[0]}"
        ) from error
    # What is compared is the served model, which takes no more than this whatever the source takes.
    limit = spec.max_seq_length
    reference.max_seq_length = min(reference.max_seq_length or limit, limit)
    file = WeightFile.open(weights)
    digest = file.verify()
    engine = Encoder(file, spec, choose("cpu", "float32"))
    tokens = Tokenizer.parse(tokenizer, spec)(TEXTS)
    rows = engine.check(tokens.input_ids, tokens.length)
    expected = []
    for text in TEXTS:  # one at a time: a batch of the source library is padded
        expected.append(reference.encode(text, show_progress_bar=False).astype(np.float32))
        progress(1)
    cosines = [cosine(a, b) for a, b in zip(expected, engine.embed(rows), strict=True)]
    worst = int(np.argmin(cosines))
    if not cosines[worst] >= LEAST_COSINE:
        raise NotFaithful(
            f"{source}: the converted model's vector for {TEXTS[worst][:40]!r} has cosine "
            f"{cosines[worst]:.6f} with sentence-transformers', wanted {LEAST_COSINE}"
        )
    return Certificate(
        worst_cosine=cosines[worst],
        mean_cosine=float(np.mean(cosines)),
        texts=len(TEXTS),
        weights_sha256=digest,
        tokenizer_sha256=hashlib.sha256(tokenizer).hexdigest(),
        model_sha256=spec.sha256(),
        versions={name: version(name) for name in LIBRARIES},
        probes=tuple(Probe(tuple(rows[i].tolist()), expected[i]) for i in PROBES),
    )
