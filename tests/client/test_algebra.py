# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from arrowhead_client import (
    InvalidInput,
    cosine_similarity,
    dequantize,
    normalize,
    quantize,
    truncate_dimensions,
)

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


ranges = st.floats(-100, 100, width=32)


@given(st.data(), st.sampled_from(["int8", "uint8"]))
def test_a_code_is_the_nearest_of_256_steps(data: st.DataObject, precision: Any) -> None:
    width = data.draw(st.integers(1, 6))
    rows = hnp.arrays(np.float32, (3, width), elements=ranges)
    low, high = np.sort([data.draw(rows)[0], data.draw(rows)[1]], axis=0)
    vectors = data.draw(rows)
    codes = quantize(vectors, precision, [low, high])
    assert (codes.shape, codes.dtype) == (vectors.shape, np.dtype(precision))
    back = dequantize(codes, precision, [low, high])
    step = np.where(high > low, (high - low) / 255, 1)
    within = np.clip(vectors, low, low + 255 * step)
    assert (abs(back - within) <= step / 2 + 1e-4).all()


def test_codes_are_those_of_sentence_transformers() -> None:
    from sentence_transformers.util.quantization import quantize_embeddings

    vectors = np.random.default_rng(0).standard_normal((20, 24)).astype(np.float32)
    found = np.stack([vectors.min(axis=0), vectors.max(axis=0)])
    for precision in ("int8", "uint8"):
        theirs = quantize_embeddings(vectors, precision, ranges=found).astype(int)
        # They cut a code's fraction off, which we round: half a step nearer.
        assert set(np.unique(quantize(vectors, precision, found) - theirs)) <= {0, 1}
    for precision in ("binary", "ubinary"):
        theirs = quantize_embeddings(vectors, precision)
        np.testing.assert_array_equal(quantize(vectors, precision), theirs)
        assert quantize(vectors, precision).dtype == theirs.dtype


def test_bits_come_back_as_signs_and_a_cut_keeps_its_components_codes() -> None:
    vectors = np.array([[0.5, -0.5, 0.0, 2, -1, 1, 1, -3]], np.float32)
    for precision in ("binary", "ubinary"):
        signs = dequantize(quantize(vectors, precision), precision)
        assert signs.tolist() == [[1, -1, -1, 1, -1, 1, 1, -1]]
    found = np.stack([np.full(8, -4.0), np.full(8, 4.0)])
    short = quantize(vectors, "int8", found, dimensions=3)
    np.testing.assert_array_equal(short, quantize(vectors, "int8", found)[:, :3])
    np.testing.assert_allclose(dequantize(short, "int8", found), vectors[:, :3], atol=0.02)


@pytest.mark.parametrize("found", [None, np.ones((2, 3)), np.ones((1, 4)), np.ones(4)])
def test_ranges_that_are_not_the_vectors(found: Any) -> None:
    with pytest.raises(InvalidInput, match=r"no ranges|wanted \(2, 4\)"):
        quantize(np.ones((1, 4)), "uint8", found)
    with pytest.raises(InvalidInput, match=r"wanted 1\.\.4"):
        quantize(np.ones((1, 4)), "binary", dimensions=5)
