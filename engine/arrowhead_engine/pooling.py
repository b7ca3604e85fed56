# SPDX-License-Identifier: Apache-2.0
"""Token vectors -> one vector per text, in float32.

Same as `sentence_transformers.models.Pooling`, on packed tokens. Each function takes the token
vectors float32 [T, D] and the lengths int64 [B] of the texts lying end to end in them, and gives
[B, D].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor


def mean(tokens: Tensor, lengths: Tensor) -> Tensor:
    """The mean of a text's token vectors, special tokens included."""
    return torch.segment_reduce(tokens, "mean", lengths=lengths, unsafe=True)


def cls(tokens: Tensor, lengths: Tensor) -> Tensor:
    """The vector of a text's first token."""
    return tokens.index_select(0, lengths.cumsum(0) - lengths)


POOLINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mean": mean, "cls": cls}


def normalize(vectors: Tensor) -> Tensor:
    """Scales each row of [B, D] to length 1 (a zero row stays zero)."""
    return F.normalize(vectors, dim=-1)
