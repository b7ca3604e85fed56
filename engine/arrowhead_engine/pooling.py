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


def mean_sqrt_len(tokens: Tensor, lengths: Tensor) -> Tensor:
    """The sum of a text's token vectors over the square root of their number."""
    return mean(tokens, lengths) * lengths.sqrt()[:, None]


def weighted_mean(tokens: Tensor, lengths: Tensor) -> Tensor:
    """The mean of a text's token vectors, the first counting once, the second twice, and so on."""
    starts = lengths.cumsum(0) - lengths
    places = torch.arange(len(tokens), device=tokens.device) - starts.repeat_interleave(lengths)
    total = mean(tokens * (places + 1)[:, None], lengths) * lengths[:, None]
    return total / (lengths * (lengths + 1) / 2)[:, None]


def maximum(tokens: Tensor, lengths: Tensor) -> Tensor:
    """The largest value of each component over a text's tokens."""
    return torch.segment_reduce(tokens, "max", lengths=lengths, unsafe=True)


def last(tokens: Tensor, lengths: Tensor) -> Tensor:
    """The vector of a text's last token."""
    return tokens.index_select(0, lengths.cumsum(0) - 1)


# By sentence-transformers' names.
POOLINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": mean,
    "cls": cls,
    "max": maximum,
    "mean_sqrt_len_tokens": mean_sqrt_len,
    "weightedmean": weighted_mean,
    "lasttoken": last,
}


def normalize(vectors: Tensor) -> Tensor:
    """Scales each row of [B, D] to length 1 (a zero row stays zero)."""
    return F.normalize(vectors, dim=-1)
