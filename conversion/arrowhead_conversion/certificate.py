# SPDX-License-Identifier: Apache-2.0
"""The parity certificate: our float32 vectors beside sentence-transformers' own."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from arrowhead_conversion import calibration
from arrowhead_conversion.errors import NotFaithful, UnsupportedSource
from arrowhead_conversion.pipeline import Described
from arrowhead_conversion.weights import Storage
from arrowhead_engine.encoder import Encoder, cosine
from arrowhead_engine.spec import MODEL_KEY, Certificate, ModelSpec, Probe, model_sha256
from arrowhead_engine.tokenizer import Tokenizer
from arrowhead_engine.weightfile import WeightFile

# Lowest cosine with the source by how the weights are stored. What float16 costs is below 1e-6;
# bfloat16 has 8 bits of each weight, int8 a row's 255 steps.
LEAST_COSINE: dict[Storage, float] = {
    "float32": 0.99999,
    "float16": 0.99999,
    "bfloat16": 0.999,
    "int8": 0.99,
}
MOST_LONGER = 0.02  # how far from 1 the ratio of the vectors' lengths may be

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
PROMPTED = (0, 3, 21)  # of TEXTS, embedded with each of the model's prompts too


class Case(NamedTuple):
    """A text, as the source library takes it and as we do."""

    text: str
    prompt_name: str | None
    ours: str


def cases(spec: ModelSpec) -> list[Case]:
    """What is compared: `TEXTS`, and some of them with each prompt."""
    return [Case(text, None, text) for text in TEXTS] + [
        Case(TEXTS[i], name, prompt + TEXTS[i])
        for name, prompt in spec.prompts.items()
        if prompt
        for i in PROMPTED
    ]


def certify(
    model: Described,
    weights: Path,
    tokenizer: bytes,
    storage: Storage,
    progress: Callable[[int], object],
) -> Certificate:
    """Embeds the `cases` with the source library and with the engine, and compares.

    Args:
        model: the source.
        weights: the weight file made from it.
        tokenizer: the bytes of its `tokenizer.json`.
        storage: how the weights are stored.
        progress: called with 1 after each text.

    Raises:
        NotFaithful: names the text that is farthest off.
        UnsupportedSource: the source library cannot load the model.
    """
    spec = model.spec
    compared = cases(spec)
    # First, and gone before ours is built: a model's weights are in memory once.
    expected = _reference(model, compared, progress)
    gc.collect()  # the source library's modules refer to each other in circles
    file = WeightFile.open(weights)
    file.verify()
    engine = Encoder(file, spec, device="cpu", dtype="float32")
    tokens = Tokenizer.parse(tokenizer, spec)([case.ours for case in compared])
    rows = engine.check(tokens.input_ids, tokens.length)
    met = engine.embed(rows)
    cosines = [cosine(a, b) for a, b in zip(expected, met, strict=True)]
    worst, least = int(np.argmin(cosines)), LEAST_COSINE[storage]
    longer = [
        float(np.linalg.norm(b) / np.linalg.norm(a)) for a, b in zip(expected, met, strict=True)
    ]
    if not cosines[worst] >= least:
        raise NotFaithful(
            f"{model.folder}: the converted model's vector for {compared[worst].ours[:40]!r} has "
            f"cosine {cosines[worst]:.6f} with sentence-transformers', wanted {least}"
        )
    uneven = max(longer, key=lambda ratio: abs(ratio - 1))
    if not abs(uneven - 1) <= MOST_LONGER:
        raise NotFaithful(
            f"{model.folder}: a vector of the converted model is {uneven:.4f} times as long as "
            "sentence-transformers'"
        )
    probes = [rows[i] for i in PROBES]
    ranges = calibration.ranges(engine, Tokenizer.parse(tokenizer, spec), met)
    del engine
    half = Encoder(file, spec, device="cpu", dtype="bfloat16").embed(probes)
    return Certificate(
        worst_cosine=cosines[worst],
        mean_cosine=float(np.mean(cosines)),
        texts=len(compared),
        weights_sha256=file.sha256(),
        tokenizer_sha256=hashlib.sha256(tokenizer).hexdigest(),
        model_sha256=model_sha256({MODEL_KEY: spec.to_json()}),
        versions={name: version(name) for name in LIBRARIES},
        probes=tuple(Probe(tuple(rows[i].tolist()), met[i]) for i in PROBES),
        ranges=ranges,
        bfloat16_cosine=min(cosine(met[i], b) for i, b in zip(PROBES, half, strict=True)),
    )


def _reference(
    model: Described, compared: list[Case], progress: Callable[[int], object]
) -> list[npt.NDArray[np.float32]]:
    """The source library's vectors, in float32 whatever the checkpoint is in."""
    # Imported here: they take seconds, and nothing else of a conversion needs them.
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        reference: Any = SentenceTransformer(
            str(model.folder),
            device="cpu",
            local_files_only=True,
            model_kwargs={"dtype": torch.float32},
        )
        if not model.says_itself:  # it has guessed a pooling, and there is none to load
            reference[1] = type(reference[1])(
                reference[0].get_embedding_dimension(), pooling_mode=model.spec.pooling
            )
    except Exception as error:  # whatever a broken model makes it raise
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UnsupportedSource(
            f"{model.folder}: sentence-transformers cannot load it: {reason[0]}"
        ) from error
    # What is compared is the served model, which takes no more than this whatever the source takes.
    limit = model.spec.max_seq_length
    reference.max_seq_length = min(reference.max_seq_length or limit, limit)
    vectors = []
    for text, prompt_name, _ in compared:  # one at a time: a batch of the source library is padded
        vector = reference.encode(
            text,
            prompt_name=prompt_name,
            show_progress_bar=False,
            normalize_embeddings=not model.says_itself and model.spec.normalize,
        )
        vectors.append(vector.astype(np.float32))
        progress(1)
    return vectors
