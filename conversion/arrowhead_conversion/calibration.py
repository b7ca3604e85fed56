# SPDX-License-Identifier: Apache-2.0
"""The ranges of a model's components, for embeddings that are given out as int8.

From 256 sentences of many kinds beside the certificate's texts, few enough that a large model is
calibrated in seconds. The ranges are twice as wide as what these need: of MiniLM's vectors of other
texts 2 % of the components lie outside what was met, which costs a cosine of 0.992 at worst, while
steps of twice the size cost 0.9999.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from arrowhead_engine.encoder import Encoder
from arrowhead_engine.tokenizer import Tokenizer

_SUBJECTS = (
    "a violin", "the immune system", "a mortgage", "the monsoon", "a chess opening", "bread dough",
    "the Roman senate", "a database index", "a volcano", "childhood asthma", "a divorce lawyer",
    "the stock market", "an electric car", "a football club", "solar panels", "a broken printer",
)  # fmt: skip
_FRAMES = (
    "What is {}?",
    "How much does {} cost in Berlin?",
    "My grandmother never stopped talking about {}.",
    "We studied the effect of temperature on {} in a controlled trial of 120 cases.",
    "{} was mentioned twice in yesterday's news.",
    "Warning: do not touch {} before reading the manual!",
    "The history of {} begins in the nineteenth century.",
    "Error 404: {} not found",
    "Nothing makes me as angry as {}.",
    "A child draws {} with a blue pencil on the kitchen floor.",
    "According to the ministry, {} accounts for nearly half of all complaints.",
    "I would recommend {} to anyone; five stars.",
    "def {}(self): return None",
    "Compare {} with its main competitors and list three advantages.",
    "Yesterday, {}; today, silence.",
    "There is no evidence that {} reduces the risk of heart disease in older adults.",
)
TEXTS = tuple(frame.format(subject) for subject in _SUBJECTS for frame in _FRAMES)
_STEP = 32  # texts embedded at once


def ranges(
    engine: Encoder, tokenizer: Tokenizer, more: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    """Around what each component was in `TEXTS` and in vectors of more texts, twice as wide.

    Args:
        engine: in float32.
        tokenizer: the model's.
        more: vectors [N, D].

    Returns:
        float32 [2, D].
    """
    vectors = [more]
    for start in range(0, len(TEXTS), _STEP):
        tokens = tokenizer(TEXTS[start : start + _STEP])
        vectors.append(engine.embed(engine.check(tokens.input_ids, tokens.length)))
    every = np.concatenate(vectors)
    low, high = every.min(axis=0), every.max(axis=0)
    found: npt.NDArray[np.float32] = np.stack([low - (high - low) / 2, high + (high - low) / 2])
    return found
