# SPDX-License-Identifier: Apache-2.0
"""What a caller may do to a vector once it is there: pure functions, no network.

Shapes: `[..., D]` is one vector or any array of vectors, D its width; the last axis is the vector.
All results are float32, and new arrays. Sums run in float64, so no float32 input overflows.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from arrowhead_client._errors import InvalidInput

Vectors: TypeAlias = npt.NDArray[np.float32]


def normalize(vectors: npt.ArrayLike) -> Vectors:
    """The vectors scaled to length 1, float32 `[..., D]`. A zero vector stays zero.

    >>> normalize([3.0, 4.0]).tolist()
    [0.6000000238418579, 0.800000011920929]
    """
    array = _floats(vectors)
    lengths = np.sqrt(np.einsum("...d,...d->...", array, array, dtype=np.float64))[..., np.newaxis]
    return np.divide(array, np.where(lengths == 0, 1.0, lengths)).astype(np.float32)


def truncate_dimensions(vectors: npt.ArrayLike, dimensions: int) -> Vectors:
    """The first `dimensions` components, scaled to length 1 again: float32 `[..., dimensions]`.

    This is how a Matryoshka embedding is made shorter. Of a model that was not trained for it the
    short vectors are poor. A vector whose first components are all zero gives zeros.

    Raises:
        InvalidInput: `dimensions` is below 1 or above D.
    """
    array = _floats(vectors)
    width = array.shape[-1]
    if not 1 <= dimensions <= width:
        raise InvalidInput(
            f"dimensions={dimensions}, but the vectors have {width}: wanted 1..{width}"
        )
    return normalize(array[..., :dimensions])


def cosine_similarity(a: npt.ArrayLike, b: npt.ArrayLike | None = None) -> Vectors:
    """The cosine of every vector of `a` with every vector of `b` (default: of `a`).

    Args:
        a: `[N, D]`, or `[D]` for one vector.
        b: `[M, D]`, or `[D]` for one vector.

    Returns:
        float32 `[N, M]`, in -1..1 up to rounding. A zero vector gives 0 with everything.

    Raises:
        InvalidInput: the widths differ, or there are more than two axes.
    """
    left = normalize(np.atleast_2d(_floats(a)))
    right = left if b is None else normalize(np.atleast_2d(_floats(b)))
    if left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[1]:
        raise InvalidInput(
            f"cannot compare shapes {left.shape} and {right.shape}: wanted [N, D] and [M, D]"
        )
    similarity: Vectors = left @ right.T
    return similarity


def _floats(vectors: npt.ArrayLike) -> npt.NDArray[Any]:
    """The vectors as a float array: floats as they are, whole numbers as float32."""
    array = np.asarray(vectors)
    if array.ndim == 0 or array.dtype.kind not in "fiu":
        raise InvalidInput(
            f"not vectors: shape {array.shape}, dtype {array.dtype}; wanted numbers [..., D]"
        )
    return array if array.dtype.kind == "f" else array.astype(np.float32)
