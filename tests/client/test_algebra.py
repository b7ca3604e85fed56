# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from arrowhead_client import InvalidInput, cosine_similarity, normalize, truncate_dimensions

floats = st.floats(-(2.0**100), 2.0**100, width=32)
shapes = hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=8)
matrices = hnp.arrays(np.float32, shapes, elements=floats)


@given(matrices)
def test_normalised_rows_have_length_one_or_are_zero(vectors: np.ndarray) -> None:
    before = vectors.copy()
    lengths = np.linalg.norm(normalize(vectors).astype(np.float64), axis=1)
    zero = ~vectors.any(axis=1)
    np.testing.assert_allclose(lengths[~zero], 1, rtol=1e-5)
    np.testing.assert_array_equal(lengths[zero], 0)
    np.testing.assert_array_equal(vectors, before)


@given(matrices, st.data())
def test_truncating_cuts_then_normalises(vectors: np.ndarray, data: st.DataObject) -> None:
    width = data.draw(st.integers(1, vectors.shape[1]))
    short = truncate_dimensions(vectors, width)
    np.testing.assert_array_equal(short, normalize(vectors[:, :width]))
    assert (short.shape, short.dtype) == ((len(vectors), width), np.float32)


@given(matrices)
def test_cosine_is_symmetric_and_one_with_itself(vectors: np.ndarray) -> None:
    cosines = cosine_similarity(vectors)
    np.testing.assert_allclose(cosines, cosines.T, atol=1e-6)
    np.testing.assert_allclose(np.diag(cosines), vectors.any(axis=1).astype(float), atol=1e-5)
    # Not to the bit: BLAS multiplies a matrix with itself by another routine.
    np.testing.assert_allclose(cosines, cosine_similarity(vectors, vectors), atol=1e-6)


def test_cosine_by_hand() -> None:
    cosines = cosine_similarity([[1, 0], [3, 4]], [0, 2])
    np.testing.assert_allclose(cosines, [[0], [0.8]], atol=1e-7)
    assert cosines.dtype == np.float32


def test_one_vector_is_as_good_as_a_row() -> None:
    np.testing.assert_allclose(normalize([3, 4]), [0.6, 0.8], rtol=1e-6)
    np.testing.assert_allclose(truncate_dimensions([3, 4, 5], 2), [0.6, 0.8], rtol=1e-6)


@pytest.mark.parametrize("dimensions", [0, -1, 4])
def test_dimensions_out_of_range(dimensions: int) -> None:
    with pytest.raises(InvalidInput, match=r"wanted 1\.\.3"):
        truncate_dimensions(np.ones((2, 3)), dimensions)


@pytest.mark.parametrize("value", [1.0, ["a"], [True]])
def test_what_is_no_vector(value: object) -> None:
    with pytest.raises(InvalidInput, match="not vectors"):
        normalize(value)  # type: ignore[arg-type]


@pytest.mark.parametrize(("a", "b"), [((2, 3), (2, 4)), ((1, 2, 3), (2, 3))])
def test_widths_that_do_not_fit(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    with pytest.raises(InvalidInput, match="cannot compare"):
        cosine_similarity(np.ones(a), np.ones(b))
