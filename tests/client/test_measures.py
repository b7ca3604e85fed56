# SPDX-License-Identifier: Apache-2.0
"""The measures against scikit-learn, scipy and hand-made rankings."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from sklearn.metrics import ndcg_score
from sklearn.metrics.pairwise import cosine_similarity as sklearn_cosine

from arrowhead_client import InvalidInput
from arrowhead_client.measures import (
    NO_HIT,
    cosines,
    gains,
    ndcg,
    recall,
    reciprocal_rank,
    search,
    spearman,
)

values = st.lists(st.integers(-3, 3), min_size=2, max_size=30).filter(lambda v: len(set(v)) > 1)


@given(st.data(), values)
def test_spearman_is_scipys_with_ties(data: st.DataObject, a: list[int]) -> None:
    b = data.draw(st.permutations([i // 2 for i in range(len(a) + 1)]))[: len(a)]
    if len(set(b)) > 1:
        assert spearman(a, b) == pytest.approx(spearmanr(a, b).statistic, abs=1e-12)


def test_spearman_of_equal_values_is_an_error() -> None:
    with pytest.raises(InvalidInput, match="all values are equal"):
        spearman([1, 2, 3], [4, 4, 4])


def test_cosines_are_taken_row_by_row_and_of_nothing_are_zero() -> None:
    a = np.array([[1, 0], [1, 1], [0, 0]], np.float32)
    b = np.array([[2, 0], [1, -1], [1, 0]], np.float32)
    assert cosines(a, b).tolist() == pytest.approx([1.0, 0.0, 0.0])


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 15))
def test_ndcg_is_scikit_learns(seed: int, documents: int, k: int) -> None:
    """Graded relevance, of every document; scikit-learn takes scores, ours a ranking."""
    random = np.random.default_rng(seed)
    relevance = random.integers(0, 4, (5, documents))
    relevance[:, 0] += 1  # scikit-learn and trec_eval agree on queries with something to find
    scores = random.permuted(np.tile(np.arange(documents), (5, 1)), axis=1)  # no ties
    judged = [dict(enumerate(row)) for row in relevance.tolist()]
    hits = np.argsort(-scores, axis=1)
    found = ndcg(gains(hits, judged), judged, k)
    if documents > 1:  # scikit-learn refuses a single document
        assert found.mean() == pytest.approx(ndcg_score(relevance, scores, k=k), abs=1e-12)
    assert ((found >= 0) & (found <= 1 + 1e-12)).all()


def test_a_ranking_by_hand() -> None:
    judged = [{7: 2, 3: 1, 9: 0}, {1: 1}, {5: 0}]
    hits = np.array([[4, 7, 9, 3], [0, 2, 3, NO_HIT], [5, 1, 2, 3]])
    found = gains(hits, judged)
    assert found.tolist() == [[0, 2, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0]]
    # By the formula: (2 / log2 3 + 1 / log2 5) / (2 / log2 2 + 1 / log2 3)
    assert ndcg(found, judged, 10).tolist() == pytest.approx([0.6433, 0, 0], abs=1e-4)
    assert ndcg(found, judged, 2)[0] == pytest.approx(0.4796, abs=1e-4)
    assert recall(found, judged, 4).tolist() == [1, 0, 0]
    assert recall(found, judged, 3).tolist() == [0.5, 0, 0]
    assert reciprocal_rank(found, 4).tolist() == [0.5, 0, 0]
    assert reciprocal_rank(found, 1).tolist() == [0, 0, 0]


@pytest.mark.parametrize("sizes", [[60], [1] * 60, [7, 20, 33]])
@pytest.mark.parametrize("k", [1, 10, 60])
def test_search_is_a_full_sort_however_the_documents_come(sizes: list[int], k: int) -> None:
    random = np.random.default_rng(4)
    queries = random.standard_normal((11, 6)).astype(np.float32)
    documents = 3 * random.standard_normal((60, 6)).astype(np.float32)
    wanted = np.argsort(-sklearn_cosine(queries, documents), axis=1)[:, :k]
    blocks = np.split(documents, np.cumsum(sizes)[:-1])
    np.testing.assert_array_equal(search(queries, blocks, k), wanted)


def test_search_beyond_a_block_of_queries() -> None:
    random = np.random.default_rng(5)
    queries = random.standard_normal((2050, 4)).astype(np.float32)
    documents = random.standard_normal((9, 4)).astype(np.float32)
    wanted = np.argsort(-sklearn_cosine(queries, documents), axis=1)[:, :2]
    np.testing.assert_array_equal(search(queries, [documents], 2), wanted)


def test_equal_documents_keep_their_order_and_few_leave_gaps() -> None:
    same = np.ones((3, 2), np.float32)
    hits = search(np.ones((1, 2), np.float32), [same[:1], same[1:]], 5)
    assert hits.tolist() == [[0, 1, 2, NO_HIT, NO_HIT]]
