# SPDX-License-Identifier: Apache-2.0
"""How good vectors are: rank correlation, exact search, and the measures of a ranking.

Pure numpy, no network. N queries, M documents, D the width, K hits of a query. The measures are
those of trec_eval (`ndcg_cut`, `recall`, `recip_rank`), which BEIR and MTEB report; the tests prove
them against scikit-learn and scipy. They are a few lines each, so the client needs no library for
them (`ranx` brings numba, `pytrec_eval` and `ir_measures` a C extension).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from arrowhead_client._algebra import Vectors, normalize
from arrowhead_client._errors import InvalidInput

Floats: TypeAlias = npt.NDArray[np.float64]
Hits: TypeAlias = npt.NDArray[np.int64]
# For each query: the judged documents' indices, and how relevant each is (0 is: not at all).
Judgements: TypeAlias = Sequence[Mapping[int, float]]

NO_HIT = -1  # fills a row of hits where there were fewer documents
_QUERY_ROWS = 1024  # times the documents of a block (evaluate.BLOCK): the largest array of scores


def cosines(a: Vectors, b: Vectors) -> Floats:
    """The cosine of each row of `a` `[N, D]` with the same row of `b`: float64 `[N]`.

    Computed in float64; a zero vector gives 0.
    """
    x, y = a.astype(np.float64), b.astype(np.float64)
    scale = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    quotients: Floats = (x * y).sum(axis=1) / np.where(scale == 0, 1.0, scale)
    return quotients


def spearman(a: npt.ArrayLike, b: npt.ArrayLike) -> float:
    """Spearman's rank correlation of two lists, -1..1; equal values share the mean of their ranks.

    Raises:
        InvalidInput: a list whose values are all equal, which has no ranks to correlate, or that
            holds NaN.
    """
    if any(np.isnan(np.asarray(values, np.float64)).any() for values in (a, b)):
        raise InvalidInput("a value is NaN: wanted numbers to correlate")
    ranks = _ranks(a), _ranks(b)
    if any(np.ptp(found) == 0 for found in ranks):
        raise InvalidInput("all values are equal: wanted at least two different ones to correlate")
    return float(np.corrcoef(*ranks)[0, 1])


def _ranks(values: npt.ArrayLike) -> Floats:
    _, inverse, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    ranks: Floats = (ends - (counts - 1) / 2)[inverse]
    return ranks


def search(queries: Vectors, blocks: Iterable[Vectors], k: int) -> Hits:
    """The `k` documents of the highest cosine with each query, the best first.

    Exact. The documents come block by block, so all of them are never held, nor `[N, M]` scores.
    Of equal documents the earlier one comes first.

    Args:
        queries: `[N, D]`; need not be of length 1.
        blocks: the documents, `[m, D]` each; document i is the i-th row of all blocks.
        k: how many hits a query gets.

    Returns:
        int64 `[N, k]`, indices of documents; `NO_HIT` where there are fewer than `k`.
    """
    unit = normalize(queries)
    best = np.full((len(unit), k), -np.inf, np.float32)
    hits = np.full((len(unit), k), NO_HIT, np.int64)
    start = 0
    for block in blocks:
        documents = normalize(block).T
        indices = np.arange(start, start + len(block), dtype=np.int64)
        for first in range(0, len(unit), _QUERY_ROWS):
            rows = slice(first, first + _QUERY_ROWS)
            scores = np.hstack([best[rows], unit[rows] @ documents])
            columns = np.hstack([hits[rows], np.broadcast_to(indices, (len(scores), len(indices)))])
            # Stable, and what was found before stands on the left: ties go to the earlier document.
            order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
            best[rows] = np.take_along_axis(scores, order, axis=1)
            hits[rows] = np.take_along_axis(columns, order, axis=1)
        start += len(block)
    return hits


def gains(hits: Hits, judged: Judgements) -> Floats:
    """How relevant each hit `[N, K]` is: float64 `[N, K]`, 0 where nobody judged it."""
    found = [
        [max(known.get(hit, 0), 0) for hit in row]
        for row, known in zip(hits.tolist(), judged, strict=True)
    ]
    return np.array(found, np.float64).reshape(hits.shape)


def ndcg(found: Floats, judged: Judgements, k: int) -> Floats:
    """The nDCG at `k` of each query, `[N]`, 0..1; `found` are the `gains` of its hits `[N, K]`.

    A hit at rank r adds gain / log2(1 + r); the sum is divided by the best possible ranking's.
    A query with no relevant document gets 0.
    """
    best = np.zeros((len(judged), k))
    for row, known in zip(best, judged, strict=True):
        top = sorted((max(score, 0) for score in known.values()), reverse=True)[:k]
        row[: len(top)] = top
    ideal = _discounted(best)
    quotients: Floats = _discounted(found[:, :k]) / np.where(ideal == 0, 1.0, ideal)
    return quotients


def recall(found: Floats, judged: Judgements, k: int) -> Floats:
    """The share of a query's relevant documents among its first `k` hits, `[N]`; of none 0."""
    relevant = np.array([sum(score > 0 for score in known.values()) for known in judged])
    shares: Floats = (found[:, :k] > 0).sum(axis=1) / np.maximum(relevant, 1)
    return shares


def reciprocal_rank(found: Floats, k: int) -> Floats:
    """1 / the rank of a query's first relevant hit among its first `k`, `[N]`; without any 0."""
    relevant = found[:, :k] > 0
    ranks: Floats = relevant.any(axis=1) / (1.0 + relevant.argmax(axis=1))
    return ranks


def _discounted(found: Floats) -> Floats:
    total: Floats = found @ (1 / np.log2(np.arange(2, found.shape[1] + 2)))
    return total
